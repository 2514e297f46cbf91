"""Measures whether pretraining helps: `python -m app.study --fname configs/study/demo.yaml [key.path=value …]`.

On one or several data sets: generates clips if configured, pretrains with one or several objectives and seeds, probes
the frozen pretrained and random encoders on the same labelled clips, trains the same encoder with the labels from
scratch and from the pretrained weights, evaluates non-learned baselines, and writes one report. Each part is a program
of this repository, run as a child process. After a stop or an error, the same command continues.
"""

import tubelet.runtime.start_up  # noqa: F401, isort: skip, first, for Ctrl-C during the imports below

import datetime
from pathlib import Path

from app.study.options import Options
from app.study.plan import PROGRAMS, Costs, plan, preparation
from app.study.plan.checks import check_configurations
from app.study.plan.compute import read_costs
from app.study.plan.lists import write_lists
from app.study.results import summarise
from tubelet import report as pages
from tubelet.config import ConfigError, read
from tubelet.report import layout, study_file
from tubelet.runtime import command_line
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.jobs import JobFailed, Pool, finished


def run(options: Options) -> None:
    """Run the jobs that are not done yet, write the report, print the tables.

    Raises:
        ConfigError: No data set has its folder, a folder or a fold does not exist, or a YAML file has an error.
        JobFailed: Some jobs failed; the report has the results of the others.
    """
    folder, studies = Path(options.folder), options.studies()
    for key in options.left_out():
        print(f"{key} is not given, so this data set is left out")
    if not studies:
        raise ConfigError(f"give the folder of a data set, e.g. {options.left_out()[0]}=/path/to/videos")
    for name, study in studies.items():
        write_lists(study, "" if options.datasets is None else f"datasets.{name}.")
    pool = Pool(options.processes, options.threads, PROGRAMS, keep_going=True)
    costs = prepare(pool, studies)
    jobs = plan(studies, costs)
    check_configurations(jobs)
    print(f"{len(jobs)} jobs, {options.processes} at a time with {options.threads} thread(s) each; logs in {folder}")
    seconds = pool.run(jobs)
    report = summary(options, studies, costs, seconds, pool.failed)
    write_json(folder / study_file.NAME, report)
    write_atomic(folder / "table.md", layout.markdown(report))
    page = pages.write(folder)
    print(f"\n{layout.plain_text(report)}")
    total = datetime.timedelta(seconds=round(sum(seconds.values())))
    print(f"\n{page} (the jobs took {total} in total)")
    if pool.failed:
        raise JobFailed("\n".join([*pool.failed.values(), "The report has the results of all other jobs."]))


def prepare(pool: Pool, studies: dict[str, Options]) -> dict[str, Costs]:
    """Generate clips and measure training steps. Returns the costs of the data sets with equal compute.

    Raises:
        ConfigError: The options of a program are invalid.
    """
    equal = {name: study for name, study in studies.items() if study.compute is not None}
    if equal:
        jobs = preparation(studies)
        if len(finished(jobs)) < len(jobs):  # all that follows, with as many steps as its YAML files say
            none = {"compute": None, "curves": None}
            check_configurations(plan({name: study.model_copy(update=none) for name, study in studies.items()}, {}))
        pool.run(jobs)
    return {name: read_costs(study) for name, study in equal.items()}


def summary(
    options: Options,
    studies: dict[str, Options],
    costs: dict[str, Costs],
    seconds: dict[str, float],
    failed: dict[str, str],
) -> dict[str, object]:
    """Return the content of `study.json`."""
    datasets = {name: summarise(study, costs.get(name, {})) for name, study in studies.items()}
    for name, data in datasets.items():
        prefix = f"{name}:" if len(studies) > 1 else ""
        if missing := [job for job in failed if job.startswith(prefix)]:
            data["notes"].append(f"Without the results of jobs that failed or need one that did: {', '.join(missing)}.")
    probes = {f"Probe of {name}": read(study.probe.fname, study.probe.overrides) for name, study in studies.items()}
    return {
        "title": options.title,
        "datasets": datasets,
        "settings": {"Study": options.model_dump(mode="json"), **probes},
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
    }


if __name__ == "__main__":
    command_line.run("app.study", __doc__, Options, run, configs=("study",))
