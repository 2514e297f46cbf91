"""Measures whether pretraining helps: `python -m app.study --fname configs/study/demo.yaml [key.path=value …]`.

Generates clips if configured, pretrains from several seeds, probes the frozen pretrained and random encoders on the
same labelled clips, trains the same encoder from scratch with the labels, evaluates non-learned baselines, and writes
one report. Each part is a program of this repository, run as a child process. After a stop, the same command continues.
"""

import datetime
from pathlib import Path

from app.study.options import Options
from app.study.plan import PROGRAMS, plan
from app.study.results import summarise
from tubelet import report as pages
from tubelet.config.registry import find
from tubelet.report import aggregate
from tubelet.runtime import command_line
from tubelet.runtime.files import write_json
from tubelet.runtime.jobs import Pool


def run(options: Options) -> None:
    """Run the jobs that are not done yet, write the report, print the table."""
    folder = Path(options.folder)
    if options.lists is not None:
        find("data", options.lists).write_lists(Path(options.data).absolute(), folder / "lists")
    jobs = plan(options)
    print(f"{len(jobs)} jobs, {options.processes} at a time with {options.threads} thread(s) each; logs in {folder}")
    seconds = Pool(options.processes, options.threads, PROGRAMS).run(jobs)
    report = {**summarise(options), "seconds": {stage: round(value, 1) for stage, value in seconds.items()}}
    write_json(folder / "study.json", report)
    page = pages.write(folder)
    print(f"\n{aggregate.results_table(report)}\n")
    print("\n".join([*report["verdict"], *(f"- {note}" for note in report["notes"])]))
    total = datetime.timedelta(seconds=round(sum(seconds.values())))
    print(f"\n{page} (the jobs took {total} in total)")


if __name__ == "__main__":
    command_line.run("app.study", __doc__, Options, run)
