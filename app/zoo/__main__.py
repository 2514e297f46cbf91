"""Compares encoders: `python -m app.zoo --fname configs/study/zoo.yaml [key.path=value …]`.

Each YAML of a folder names an encoder. It is measured, trained from scratch with labels and, where it can encode a
subset of the tokens, pretrained without labels and probed, as is the encoder with random weights: a study of its own
(`app.study`), all on the same clips. After a stop, the same command continues.
"""

import tubelet.runtime.start_up  # noqa: F401, isort: skip, first, for Ctrl-C during the imports below

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from app.study.options import Options as Study
from app.study.plan import PROGRAMS
from app.study.plan import plan as study_plan
from app.study.plan.checks import check_configurations
from app.study.plan.pretraining import clips_job
from app.study.results import summarise
from app.study.sections import Clips
from tubelet import config
from tubelet.config import Config, ConfigError, shipped
from tubelet.report import aggregate, layout
from tubelet.runtime import command_line, run_lock
from tubelet.runtime.files import read_json, write_json
from tubelet.runtime.jobs import Job, Pool
from tubelet.runtime.text import text_table

BASE = "base.yaml"  # common to all encoders
FACTS = {
    "parameters": ("M params", 1e6),
    "flops": ("GFLOP", 1e9),
    "bytes": ("MB kept", 1e6),
    "clips_per_second": ("clips/s", 1),
}
PRETRAINED = "pretrained"
ACCURACIES = {
    "labels": (aggregate.FINE_TUNED, "supervised"),
    "random": ("attentive", "random_best"),
    "pretrained": ("attentive", PRETRAINED),
    "random, linear": ("linear", "random_best"),
    "pretrained, linear": ("linear", PRETRAINED),
}
LEGEND = """\
Of one clip: parameters, FLOPs of a forward pass, bytes kept for the backward pass; clips/s of forward and backward
passes on one core. Top-1 in % on the task "{task}": `labels` is trained from scratch with all labelled clips; `random`
and `pretrained` are frozen encoders with an attentive probe or a linear one on the mean token; `random` is the best of
the initialisation scales. "-": the encoder needs all tokens, so it cannot be pretrained by masking some."""


class Options(Config):
    app: Literal["zoo"] = "zoo"
    """Program that the file is for."""
    folder: str
    """Folder of all runs and of `zoo.json`."""
    encoders: str
    """Folder with a pretraining YAML for each encoder."""
    only: list[str] = []
    """Names of the encoders, by default all."""
    clips: Clips
    """Clips that are generated for all encoders."""
    study: dict[str, Any]
    """Options of `app.study` for each encoder; `{zoo}` in them is replaced by this program's folder."""
    special: dict[str, dict[str, Any]] = {}
    """Changes to the studies of single encoders."""
    processes: int = Field(2, ge=1)
    """Number of programs that run in parallel."""
    threads: int = Field(1, ge=1)
    """Threads of each program."""

    def run_locks(self) -> list[run_lock.Lock]:
        """Return what this program locks; its children lock their folders."""
        return [run_lock.Lock(Path(self.folder), name=".lock-zoo")]


def run(options: Options) -> None:
    """Run the jobs that are not done yet, print the table and write it to zoo.json."""
    folder = Path(options.folder)
    files = encoder_files(options)
    studies = {name: encoder_study(options, name, path) for name, path in files.items()}
    base = baselines_study(options)
    task = base.main_task
    jobs = plan(options, files, studies)
    check_configurations(jobs)
    print(f"{len(files)} encoders, {len(jobs)} jobs, {options.processes} at a time; logs in {folder}")
    Pool(options.processes, options.threads, PROGRAMS).run(jobs)
    rows = {name: row(options, name, study, task) for name, study in studies.items()}
    baselines = summarise(base, {})["accuracy"][aggregate.BASELINE]
    write_json(folder / "zoo.json", {"task": task, "encoders": rows, "baselines": baselines})
    print(f"\n{table(rows)}\n\n{LEGEND.format(task=task)}")
    for name, accuracies in baselines.items():
        print(f"no network, {layout.BASELINES[name]}: {aggregate.text_cell(accuracies[task])}")


def encoder_files(options: Options) -> dict[str, Path]:
    """The YAML of each encoder. Raises ConfigError if the folder has none, or none of a name in the options."""
    files = {
        path.stem: path for path in sorted(shipped.find_folder(options.encoders).glob("*.yaml")) if path.name != BASE
    }
    if not files:
        raise ConfigError(f"encoders: no YAML files in {options.encoders}")
    for key, names in (("only", options.only), ("special", options.special)):
        for name in names:
            if name not in files:
                raise ConfigError(f"{key}: no '{name}' in {options.encoders}. {config.nearest(name, files)}")
    return {name: path for name, path in files.items() if not options.only or name in options.only}


def encoder_study(options: Options, name: str, path: Path) -> Study:
    """The study of one encoder; without pretraining and probes if the encoder needs all tokens."""
    import torch  # takes seconds, which `--help` need not wait for

    from app.zoo.measure import build

    objectives = {PRETRAINED: {"fname": str(path)}}
    fixed = {"folder": f"{options.folder}/{name}", "objectives": objectives, "baselines": None}
    raw = config.merge(config.merge(options.study, options.special.get(name, {})), fixed)
    with torch.device("meta"):  # without memory for the weights
        encoder = build(path)
    if not encoder.accepts_masks:
        raw = config.merge(raw, {"pretrain": {"seeds": []}, "random": {"seeds": []}})
    return config.check(_fill(raw, options.folder), Study, path)


def baselines_study(options: Options) -> Study:
    """The non-learned baselines, which are the same for all encoders."""
    path = next(iter(encoder_files(options).values()))
    fixed = {"folder": f"{options.folder}/baselines", "objectives": {PRETRAINED: {"fname": str(path)}}}
    none: dict[str, Any] = {"pretrain": {"seeds": []}, "random": {"seeds": []}, "supervised": None}
    raw = config.merge(options.study, {**fixed, **none})
    return config.check(_fill(raw, options.folder), Study, "baselines")


def _fill(raw: dict[str, Any], folder: str) -> dict[str, Any]:
    return json.loads(json.dumps(raw).replace("{zoo}", folder))


def plan(options: Options, files: dict[str, Path], studies: dict[str, Study]) -> list[Job]:
    """All jobs: the clips, then the longest first. Names begin with the encoder's."""
    clips = clips_job(options.folder, options.clips, options.processes)
    jobs = [_measure_job(options, name, path) for name, path in files.items()]
    for job in study_plan({**studies, "baselines": baselines_study(options)}, {}):
        settings = {**job.settings, "clips": options.clips.given()}
        jobs.append(replace(job, after=job.after or (clips.name,), settings=settings))
    return [clips, *sorted(jobs, key=lambda job: -job.seconds)]


def _measure_job(options: Options, name: str, path: Path) -> Job:
    folder = Path(options.folder) / name / "facts"
    return Job(
        name=f"{name}:facts",
        stage="facts",
        command=("app.zoo.measure", "--fname", str(path), "--folder", str(folder)),
        folder=folder,
        settings=config.read(path),
        seconds=12,
        slots=options.processes,  # no other job may run while it measures times
    )


def row(options: Options, name: str, study: Study, task: str) -> dict[str, Any]:
    """The measurements of one encoder; accuracies on `task` are [mean, standard deviation] in percent."""
    facts = read_json(Path(options.folder) / name / "facts" / "facts.json")
    data = summarise(study, {})
    accuracies = {column: layout.cell(data, head, row, task) for column, (head, row) in ACCURACIES.items()}
    return {**facts, **accuracies}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the facts and accuracies of all encoders as text, a line for each."""
    grid = [["encoder", *(title for title, _ in FACTS.values()), *ACCURACIES]]
    for name, cells in rows.items():
        facts = [f"{cells[key] / unit:.3g}" for key, (_, unit) in FACTS.items()]
        grid.append([name, *facts, *(aggregate.text_cell(cells[key]) for key in ACCURACIES)])
    return text_table(grid, align_right=True)


if __name__ == "__main__":
    command_line.run("app.zoo", __doc__, Options, run, configs=("study",))
