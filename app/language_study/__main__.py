"""Compares models that write about videos: `python -m app.language_study --fname configs/study/language.yaml`.

Generates described scenes, pretrains an encoder on scenes without descriptions, and trains for each task a model with
each kind of encoder, as well as one that does not see the video. Writes language.json and table.md. After a stop, the
same command continues.
"""

import tubelet.runtime.start_up  # noqa: F401, isort: skip, first, for Ctrl-C during the imports below

import datetime
from pathlib import Path
from typing import Any

from app.language_study.options import Options
from app.language_study.table import best_retrieval, measurements, tables
from tubelet import config
from tubelet.runtime import command_line
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.jobs import Job, JobFailed, Pool

PROGRAMS = ("app.vjepa.train", "app.language.train", "transformers", "tubelet.data.scenes.generate")
"""Modules that are imported before the jobs are forked."""


def run(options: Options) -> None:
    """Run the jobs that are not done yet, write the tables and print them."""
    folder = Path(options.folder)
    jobs = plan(options)
    print(f"{len(jobs)} jobs, {options.processes} at a time with {options.threads} thread(s) each; logs in {folder}")
    pool = Pool(options.processes, options.threads, PROGRAMS, keep_going=True)
    seconds = pool.run(jobs)
    measured = {
        task: {
            row: [measurements(run_folder(options, task, row, seed), options.tasks[task].kind) for seed in r.seeds]
            for row, r in rows_of(options).items()
            if not any(job_name(task, row, seed) in pool.failed for seed in r.seeds)
        }
        for task in tasks_of(options)
    }
    for task, rows in measured.items():
        if options.tasks[task].kind == "retrieval":
            rows["perfect"] = [best_retrieval(folder / "scenes")]
    text = tables({options.tasks[task].kind: rows for task, rows in measured.items()})
    write_json(folder / "language.json", {"tasks": measured, "seconds": seconds})
    write_atomic(folder / "table.md", text)
    total = datetime.timedelta(seconds=round(sum(seconds.values())))
    print(f"\n{text}\n{folder / 'table.md'} (the jobs took {total} in total)")
    if pool.failed:
        raise JobFailed("\n".join([*pool.failed.values(), "The tables have the results of all other jobs."]))


def plan(options: Options) -> list[Job]:
    """Return all jobs, the longest first."""
    scenes, pretrain = _scenes_job(options), _pretrain_job(options)
    runs = [
        _run_job(options, task, row, seed, scenes, pretrain)
        for task in tasks_of(options)
        for row, r in rows_of(options).items()
        for seed in r.seeds
    ]
    return [scenes, pretrain, *sorted(runs, key=lambda job: -job.seconds)]


def tasks_of(options: Options) -> list[str]:
    """Return the names of the tasks to run."""
    return [name for name in options.tasks if name in options.only.get("tasks", options.tasks)]


def rows_of(options: Options) -> dict[str, Any]:
    """Return the rows to run."""
    return {name: row for name, row in options.rows.items() if name in options.only.get("rows", options.rows)}


def job_name(task: str, row: str, seed: int) -> str:
    """Return the name of a run."""
    return f"{task}-{row.replace(' ', '-')}-{seed}"


def run_folder(options: Options, task: str, row: str, seed: int) -> Path:
    """Return the folder of a run."""
    return Path(options.folder) / "runs" / job_name(task, row, seed)


def _scenes_job(options: Options) -> Job:
    folder = Path(options.folder) / "scenes"
    arguments = {"folder": folder, "processes": options.processes, **options.scenes}
    return Job(
        name="scenes",
        stage="scenes",
        command=("tubelet.data.scenes.generate", *(t for k, v in arguments.items() for t in (f"--{k}", str(v)))),
        folder=folder,
        settings=dict(options.scenes),
        seconds=60,
        keep=True,
        slots=options.processes,
    )


def _pretrain_job(options: Options) -> Job:
    overrides = [f"data.datasets=[{options.folder}/scenes/pretrain.csv]", *options.pretrain.overrides]
    folder, seconds = Path(options.folder) / "pretrain", options.pretrain.seconds
    return _training("pretrain", "pretrain", options.pretrain.fname, overrides, folder, seconds, ("scenes",))


def _run_job(options: Options, task: str, row: str, seed: int, scenes: Job, pretrain: Job) -> Job:
    t, r = options.tasks[task], options.rows[row]
    scenes_folder = scenes.folder
    lists = {"captions": "captions", "answers": "questions", "retrieval": "captions"}[t.kind]
    overrides = [
        f"data.dataset_train={scenes_folder}/{lists}_train.json",
        f"data.dataset_val={scenes_folder}/{lists}_test.json",
        f"data.videos={scenes_folder}/videos",
        f"data.cache_features={options.folder}/features",
        *options.fill([*t.overrides, *r.overrides, *r.tasks.get(task, [])], seed=seed),
        f"meta.seed={seed}",
    ]
    pretrained = any(str(pretrain.folder) in override for override in overrides)
    after = ("scenes", "pretrain") if pretrained else ("scenes",)
    folder, seconds = run_folder(options, task, row, seed), t.seconds * r.slower
    return _training(job_name(task, row, seed), f"{task}, {row}", t.fname, overrides, folder, seconds, after)


def _training(
    name: str, stage: str, fname: str, overrides: list[str], folder: Path, seconds: float, after: tuple[str, ...]
) -> Job:
    return Job(
        name=name,
        stage=stage,
        command=("app.main", "--fname", fname, "--devices", "cpu", *overrides, f"folder={folder}"),
        folder=folder,
        settings=config.read(fname, overrides),
        seconds=seconds,
        after=after,
    )


if __name__ == "__main__":
    command_line.run("app.language_study", __doc__, Options, run)
