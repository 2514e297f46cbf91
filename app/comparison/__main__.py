"""Compares models on tasks of language and sound: `python -m app.comparison --fname configs/study/language.yaml`.

Generates scenes, pretrains encoders on those without descriptions, and trains for each task a model with each kind of
encoder, as well as models that lack a modality. Writes comparison.json and table.md. After a stop, the same command
continues.
"""

import tubelet.runtime.start_up  # noqa: F401, isort: skip, first, for Ctrl-C during the imports below

import datetime
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from app.comparison.options import Options
from app.comparison.table import Measured, best_retrieval, measurements, tables
from app.study.plan.checks import check_configurations
from tubelet import config
from tubelet.runtime import command_line
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.jobs import Job, JobFailed, Pool

PROGRAMS = ("app.vjepa.train", "app.language.train", "app.audio.train", "transformers", "tubelet.data.scenes.generate")
"""Modules that are imported before the jobs are forked."""


def run(options: Options) -> None:
    """Run the jobs that are not done yet, write the tables and print them."""
    folder = Path(options.folder)
    jobs = plan(options)
    check_configurations(jobs)
    print(f"{len(jobs)} jobs, {options.processes} at a time with {options.threads} thread(s) each; logs in {folder}")
    pool = Pool(options.processes, options.threads, PROGRAMS, keep_going=True)
    seconds = pool.run(jobs)
    measured: dict[str, Measured] = defaultdict(dict)
    for task, row in options.selected():
        if not any(job_name(task, row, seed) in pool.failed for seed in options.seeds):
            folders = [run_folder(options, task, row, seed) for seed in options.seeds]
            measured[task][row] = [measurements(path, options.tasks[task].kind) for path in folders]
    for task in measured:
        if options.tasks[task].kind == "retrieval":
            measured[task]["perfect"] = [best_retrieval(_scenes_of(options, task))]
    text = tables(measured, {task: options.tasks[task].kind for task in measured})
    write_json(folder / "comparison.json", {"tasks": measured, "seconds": seconds})
    write_atomic(folder / "table.md", text)
    total = datetime.timedelta(seconds=round(sum(seconds.values())))
    print(f"\n{text}\n{folder / 'table.md'} (the jobs took {total} in total)")
    if pool.failed:
        raise JobFailed("\n".join([*pool.failed.values(), "The tables have the results of all other jobs."]))


def plan(options: Options) -> list[Job]:
    """Return all jobs, the longest runs first."""
    runs = [_run_job(options, task, row, seed) for task, row in options.selected() for seed in options.seeds]
    used = {name for job in runs for name in job.after}
    pretraining = [_pretrain_job(options, name) for name in options.pretrain if name in used]
    used |= {name for job in pretraining for name in job.after}
    scenes = [_scenes_job(options, name) for name in options.scenes if name in used]
    return [*scenes, *pretraining, *sorted(runs, key=lambda job: -job.seconds)]


def job_name(task: str, row: str, seed: int) -> str:
    """Return the name of a run."""
    return f"{task}-{row}-{seed}".replace(" ", "-")


def run_folder(options: Options, task: str, row: str, seed: int) -> Path:
    """Return the folder of a run."""
    return Path(options.folder) / "runs" / job_name(task, row, seed)


def _scenes_of(options: Options, task: str) -> Path:
    t = options.tasks[task]
    return Path(config.read(t.fname, options.fill(t.overrides))["data"]["dataset_val"]).parent


def _scenes_job(options: Options, name: str) -> Job:
    folder, scenes = Path(options.folder) / name, options.scenes[name]
    command = ["tubelet.data.scenes.generate", "--folder", str(folder), "--processes", str(options.processes)]
    return Job(
        name=name,
        stage="scenes",
        command=(*command, *scenes.command_line()),
        folder=folder,
        settings=scenes.given(),
        seconds=60,
        keep=True,
        slots=options.processes,
    )


def _pretrain_job(options: Options, name: str) -> Job:
    p = options.pretrain[name]
    return _training(
        options,
        name=name,
        stage=name,
        fname=p.fname,
        overrides=options.fill(p.overrides),
        folder=Path(options.folder) / name,
        seconds=p.seconds,
        source=f"pretrain.{name}",
    )


def _run_job(options: Options, task: str, row: str, seed: int) -> Job:
    t, r = options.tasks[task], options.tasks[task].rows[row]
    overrides = [*options.fill([*t.overrides, *r.overrides], seed=seed), f"meta.seed={seed}"]
    source = f"tasks.{task}.rows.{row}"
    return _training(
        options,
        name=job_name(task, row, seed),
        stage=f"{task}, {row}",
        fname=t.fname,
        overrides=overrides,
        folder=run_folder(options, task, row, seed),
        seconds=t.seconds * r.slower,
        source=f"tasks.{task}.overrides, {source}" if t.overrides else source,
    )


def _training(options: Options, *, fname: str, overrides: list[str], folder: Path, **kwargs: Any) -> Job:
    """Return the job of a program that trains, after the data and the pretraining that its overrides name.

    `kwargs` are further attributes of the job.
    """
    made = [name for name in (*options.scenes, *options.pretrain) if _is_named(f"{options.folder}/{name}", overrides)]
    return Job(
        command=("app.main", "--fname", fname, "--devices", "cpu", *overrides, f"folder={folder}"),
        folder=folder,
        settings=config.read(fname, overrides),
        after=tuple(made),
        **kwargs,
    )


def _is_named(folder: str, overrides: list[str]) -> bool:
    """Return whether overrides have this path, or one below it."""
    return any(re.search(rf"{re.escape(folder)}(?![\w-])", override) for override in overrides)


if __name__ == "__main__":
    command_line.run("app.comparison", __doc__, Options, run)
