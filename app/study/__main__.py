"""Does pretraining help? `python -m app.study --fname configs/study/demo.yaml [key.path=value ...]`.

Makes the clips if asked to, pretrains from several seeds, probes the frozen pretrained and random encoders on the same
labelled clips, trains the same encoder from scratch with the labels, measures floors that need no network, and writes
one report. Every part is a program of this repository, run as a child process; the same command goes on after a stop.
"""

import datetime
import json
from pathlib import Path

from app.study.options import Options
from app.study.plan import PROGRAMS, plan
from app.study.results import summarise
from tubelet import report as pages
from tubelet.config.registry import find
from tubelet.report import aggregate
from tubelet.runtime import jobs


def run(options: Options) -> None:
    """Do what is not done yet, write the report, print the table."""
    folder = Path(options.folder)
    if options.lists is not None:
        find("data", options.lists).write_lists(Path(options.data).absolute(), folder / "lists")
    planned = plan(options)
    print(f"{len(planned)} jobs, {options.processes} at a time with {options.threads} thread(s) each; logs in {folder}")
    seconds = jobs.Pool(options.processes, options.threads, PROGRAMS).run(planned)
    report = {**summarise(options), "seconds": {stage: round(value, 1) for stage, value in seconds.items()}}
    (folder / "study.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    page = pages.write(folder)
    print(f"\n{aggregate.text_table(report)}\n")
    print("\n".join([*report["verdict"], *(f"- {note}" for note in report["notes"])]))
    total = datetime.timedelta(seconds=round(sum(seconds.values())))
    print(f"\n{page} (all jobs together took {total} of one process)")


if __name__ == "__main__":
    jobs.main("app.study", __doc__, Options, run)
