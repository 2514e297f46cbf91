"""Does pretraining help? `python -m app.study --fname configs/study/demo.yaml [key.path=value ...]`.

Makes the clips if asked to, pretrains from several seeds, probes the frozen pretrained and random encoders on the same
labelled clips, trains the same encoder from scratch with the labels, measures floors that need no network, and writes
one report. Every part is a program of this repository, run as a child process; the same command goes on after a stop.
"""

import argparse
import datetime
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from tubelet import config, jobs
from tubelet.config import Config, ConfigError
from tubelet.jobs import Job, JobFailed
from tubelet.plugins import find
from tubelet.report import aggregate
from tubelet.report.aggregate import Result

HEADS = {"probe": "attentive", "linear": "linear"}  # the report's word, and the YAML's
ENCODER_KEYS = (
    "encoder",
    "model_name",
    "encoder_args",
    "uniform_power",
    "use_rope",
    "rope_pairing",
    "use_silu",
    "wide_silu",
)


class Task(Config):
    """A labelled set. `{folder}` and `{fold}` in the paths are replaced."""

    train: str
    test: str
    num_classes: int = Field(ge=2)
    labels_per_class: int | None = Field(None, ge=1)
    """Labelled clips of each class, drawn anew for each seed of a read-out; by default all."""


class Program(Config):
    """A YAML file of a program, the seeds to run it from, and what to change in it (`key.path=value`)."""

    fname: str
    seeds: list[int] = Field([0], min_length=1)
    overrides: list[str] = []


class Pretrain(Program):
    later_overrides: list[str] = []
    """Changes to all runs but the first seed's, for smaller ones. The report says so."""


class Supervised(Program):
    per_task: dict[str, list[str]] = {}
    """Further changes for single tasks, as more epochs where there are few labels."""


class Random(Config):
    init_stds: list[float] = Field([0.02, 0.06, 0.12], min_length=1)
    """Standard deviations of random encoders' weights; the first is the encoder's own."""
    seeds: list[int] = Field([0], min_length=1)


class Probe(Program):
    heads: list[Literal["probe", "linear"]] = Field(["probe", "linear"], min_length=1)
    linear: dict[str, Any] = {}
    """Keys that differ for the linear read-out."""


class Floors(Config):
    kinds: list[Literal["frame", "difference", "metadata"]] = Field(["frame", "difference"], min_length=1)
    num_frames: int = Field(16, ge=2)
    average: bool = True


class Seconds(Config):
    """Guesses for the progress bar: seconds of one job of each stage; measured times replace them."""

    clips: float = 60
    pretrain: float = 300
    probe: float = 60
    supervised: float = 60
    floors: float = 20


class Options(Config):
    folder: str
    title: str = "Tubelet study"
    data: str | None = None
    """Folder of a set that is not ours; `lists` names the file of tubelet/datasets that writes its lists."""
    lists: str | None = None
    folds: list[int] = Field([0], min_length=1)
    """Each fold is pretrained on its own, so that no test clip is ever seen."""
    clips: dict[str, int] | None = None
    """Arguments of `python -m tubelet.datasets.generated`, which makes clips in `<folder>/clips`."""
    cache: str | None = None
    """Folder that all programs share for decoded clips, for small sets; by default as their own files say."""
    pretrain: Pretrain
    random: Random = Random()
    tasks: dict[str, Task] = Field(min_length=1)
    headline: str | None = None
    """The task that the closing sentence is about; by default the first."""
    probe: Probe
    supervised: Supervised | None = None
    """The encoder and its patches are those of `pretrain`, whatever this file says of them."""
    floors: Floors | None = Floors()
    devices: list[str] = ["cpu"]
    processes: int = Field(2, ge=1)
    """Programs that run at once."""
    threads: int = Field(1, ge=1)
    """Of each program."""
    seconds: Seconds = Seconds()

    @model_validator(mode="after")
    def _fits_together(self) -> "Options":
        if (self.data is None) != (self.lists is None):
            raise ValueError("data and lists go together: the folder of the set, and the file that knows it")
        if self.headline is not None and self.headline not in self.tasks:
            raise ValueError(f"headline: '{self.headline}' is no task. {config.nearest(self.headline, self.tasks)}")
        return self

    def fill(self, text: str, fold: int) -> str:
        return text.replace("{folder}", self.folder).replace("{fold}", str(fold))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m app.study", usage="%(prog)s --fname FILE [key.path=value ...]", description=__doc__
    )
    parser.add_argument("--fname", required=True, help="the YAML file of the study")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the file")
    arguments = parser.parse_args()
    try:
        run(config.load(arguments.fname, arguments.overrides, Options))
    except (ConfigError, JobFailed) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


def run(options: Options) -> None:
    """Do what is not done yet, write the report, print the table."""
    folder = Path(options.folder)
    if options.lists is not None:
        find("datasets", options.lists).write_lists(Path(options.data).absolute(), folder / "lists")
    planned = plan(options)
    print(f"{len(planned)} jobs, {options.processes} at a time with {options.threads} thread(s) each; logs in {folder}")
    seconds = jobs.Pool(options.processes, options.threads).run(planned)
    report = {**summarise(options), "seconds": {stage: round(value, 1) for stage, value in seconds.items()}}
    (folder / "study.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from tubelet import report as pages  # imports torch, which the children have had to themselves until now

    page = pages.write(folder)
    print(f"\n{aggregate.text_table(report)}\n")
    print("\n".join([*report["verdict"], *(f"- {note}" for note in report["notes"])]))
    total = datetime.timedelta(seconds=round(sum(seconds.values())))
    print(f"\n{page} (all jobs together took {total} of one process)")


# What is run ------------------------------------------------------------------------------------------------------


def plan(options: Options) -> list[Job]:
    """All jobs, in the order in which they should start: long ones first, what they wait for before them."""
    clips = [] if options.clips is None else [_clips_job(options)]
    after = tuple(job.name for job in clips)
    pretrainings = [
        _pretrain_job(options, fold, seed, after) for seed in options.pretrain.seeds for fold in options.folds
    ]
    own = [job for fold in options.folds for job in _jobs_of_fold(options, fold, after)]
    probes = [_probe_job(options, fold, encoder) for encoder in pretrained_encoders(options) for fold in options.folds]
    return [*clips, *pretrainings, *own, *probes]


def _jobs_of_fold(options: Options, fold: int, after: tuple[str, ...]) -> list[Job]:
    """Jobs that need no pretraining."""
    found = []
    if options.supervised is not None:
        found += [
            _supervised_job(options, fold, seed, name, after)
            for seed in options.supervised.seeds
            for name in options.tasks
        ]
    found += [_probe_job(options, fold, encoder, after) for encoder in random_encoders(options)]
    if options.floors is not None:
        found.append(_floors_job(options, fold, after))
    return found


def run_folder(options: Options, fold: int, seed: int) -> Path:
    """Where a pretraining runs: the study's own folder for the first fold and seed, which is the run that is shown."""
    folder = Path(options.folder)
    if fold != options.folds[0]:
        folder = folder / "folds" / str(fold)
    return folder if seed == options.pretrain.seeds[0] else folder / "seeds" / str(seed)


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder that is probed."""

    row: str
    seed: int
    init_std: float | None = None

    @property
    def name(self) -> str:
        return f"{self.row}-{self.seed}" if self.init_std is None else f"{self.row}-{self.init_std}-{self.seed}"


def random_encoders(options: Options) -> list[Encoder]:
    return [Encoder("random", seed, init_std) for seed in options.random.seeds for init_std in options.random.init_stds]


def pretrained_encoders(options: Options) -> list[Encoder]:
    return [Encoder("pretrained", seed) for seed in options.pretrain.seeds]


def _clips_job(options: Options) -> Job:
    folder = Path(options.folder) / "clips"
    arguments = {"folder": folder, "processes": options.processes, **options.clips}
    words = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    return Job(
        name="clips",
        stage="clips",
        command=("tubelet.datasets.generated", *words),
        folder=folder,
        settings=options.clips,
        seconds=options.seconds.clips,
        keep=True,
        slots=options.processes,
    )


def _pretrain_job(options: Options, fold: int, seed: int, after: tuple[str, ...]) -> Job:
    folder = run_folder(options, fold, seed)
    changes = [options.fill(change, fold) for change in options.pretrain.overrides]
    changes += [f"data.cache={path}" for path in _cache(options).values()]
    if seed != options.pretrain.seeds[0]:
        changes += options.pretrain.later_overrides
    changes += [f"folder={folder}", f"meta.seed={seed}"]
    return Job(
        name=f"pretrain-fold{fold}-seed{seed}",
        stage="pretrain",
        command=("app.main", "--fname", options.pretrain.fname, "--devices", *options.devices, *changes),
        folder=folder,
        settings={"clips": options.clips, **config.read(options.pretrain.fname, changes)},
        seconds=options.seconds.pretrain,
        after=after,
        keep=True,
    )


def _probe_job(options: Options, fold: int, encoder: Encoder, after: tuple[str, ...] = ()) -> Job:
    """All tasks, read-outs and seeds of one encoder, which share its features."""
    if encoder.row == "pretrained":
        after = (f"pretrain-fold{fold}-seed{encoder.seed}",)
        pretrain: dict[str, Any] = {"folder": str(run_folder(options, fold, encoder.seed))}
    else:
        pretrain = {"folder": None, "checkpoint": "random", "init_std": encoder.init_std, "init_seed": encoder.seed}
        model, patches = _architecture(options)
        pretrain |= {key: model[key] for key in ENCODER_KEYS if key in model} | patches
    changes = {
        "pretrain": pretrain,
        "meta": {"seed": options.probe.seeds},
        "tasks": {
            _task_name(head, name): _task_changes(options, fold, task, head)
            for head in options.probe.heads
            for name, task in options.tasks.items()
        },
    }
    first = next(iter(changes["tasks"].values()))["data"]
    changes["data"] = {key: first[key] for key in ("dataset_train", "dataset_val", "num_classes")} | _cache(options)
    folder = probe_folder(options, fold, encoder)
    return _yaml_job(options, "probe", f"probe-fold{fold}-{encoder.name}", options.probe, changes, folder, after)


def probe_folder(options: Options, fold: int, encoder: Encoder) -> Path:
    return Path(options.folder) / "probes" / f"fold{fold}" / encoder.name


def _task_name(head: str, task: str) -> str:
    return f"{task}-{head}"


def _task_changes(options: Options, fold: int, task: Task, head: str) -> dict[str, Any]:
    changes = options.probe.linear if head == "linear" else {}
    return {**changes, "head": HEADS[head], "data": {**changes.get("data", {}), **_labelled(options, fold, task)}}


def _labelled(options: Options, fold: int, task: Task) -> dict[str, Any]:
    return {
        "dataset_train": options.fill(task.train, fold),
        "dataset_val": options.fill(task.test, fold),
        "num_classes": task.num_classes,
        "labels_per_class": task.labels_per_class,
        **_cache(options),
    }


def _cache(options: Options) -> dict[str, str]:
    return {} if options.cache is None else {"cache": options.fill(options.cache, options.folds[0])}


def _architecture(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section `model` of the pretraining's YAML, and its sizes of patches."""
    changes = [options.fill(change, options.folds[0]) for change in options.pretrain.overrides]
    raw = config.read(options.pretrain.fname, changes)
    return raw.get("model", {}), {key: raw["data"][key] for key in ("patch_size", "tubelet_size") if key in raw["data"]}


def _supervised_job(options: Options, fold: int, seed: int, name: str, after: tuple[str, ...]) -> Job:
    model, patches = _architecture(options)
    labelled = _labelled(options, fold, options.tasks[name])
    changes = {"data": {**labelled, **patches}, "model": model, "meta": {"seed": seed}}
    folder = supervised_folder(options, fold, seed, name)
    program = options.supervised.model_copy(
        update={"overrides": options.supervised.overrides + options.supervised.per_task.get(name, [])}
    )
    job = f"supervised-fold{fold}-{name}-{seed}"
    return _yaml_job(options, "supervised", job, program, changes, folder, after)


def supervised_folder(options: Options, fold: int, seed: int, name: str) -> Path:
    return Path(options.folder) / "supervised" / f"fold{fold}" / name / f"seed-{seed}"


def _floors_job(options: Options, fold: int, after: tuple[str, ...]) -> Job:
    tasks = {
        name: {**task.model_dump(), "train": options.fill(task.train, fold), "test": options.fill(task.test, fold)}
        for name, task in options.tasks.items()
    }
    changes = {
        "eval_name": "floors",
        "floors": options.floors.kinds,
        "num_frames": options.floors.num_frames,
        "average": options.floors.average,
        "tasks": tasks,
        "seeds": options.probe.seeds,
    }
    return _yaml_job(options, "floors", f"floors-fold{fold}", None, changes, floors_folder(options, fold), after)


def floors_folder(options: Options, fold: int) -> Path:
    return Path(options.folder) / "floors" / f"fold{fold}"


def _yaml_job(
    options: Options,
    stage: Literal["probe", "supervised", "floors"],
    name: str,
    program: Program | None,
    changes: dict[str, Any],
    folder: Path,
    after: tuple[str, ...],
) -> Job:
    """A job whose settings stand beside its folder, as a YAML over the program's own, to be read and run by hand."""
    fname = folder.with_name(f"{folder.name}.yaml")
    changes = {"folder": str(folder), **changes}
    if program is not None:
        changes = {"base": os.path.relpath(program.fname, fname.parent), **changes}
    fname.parent.mkdir(parents=True, exist_ok=True)
    fname.write_text(yaml.safe_dump(changes, sort_keys=False), encoding="utf-8")
    overrides = [options.fill(change, 0) for change in program.overrides] if program is not None else []
    package = "app.main" if stage == "supervised" else "evals.main"
    return Job(
        name=name,
        stage=stage,
        command=(package, "--fname", str(fname), "--devices", options.devices[0], *overrides),
        folder=folder,
        settings={"clips": options.clips, **config.read(fname, overrides)},
        seconds=getattr(options.seconds, stage),
        after=after,
    )


# What came out ----------------------------------------------------------------------------------------------------


def summarise(options: Options) -> dict[str, Any]:
    """Tables, margins and sentences from the folders of finished jobs."""
    results = collect(options)
    report = aggregate.tables(results, own_init_std=options.random.init_stds[0])
    errors = aggregate.standard_errors(results)
    margins = {
        head: {task: found for task in options.tasks if (found := aggregate.margin(report[head], task)) is not None}
        for head in options.probe.heads
    }
    return {
        "title": options.title,
        **report,
        "margin": margins,
        "standard_error": errors,
        "verdict": [aggregate.verdict(report, options.headline or next(iter(options.tasks)))],
        "notes": [*notes(options), *_notes_on_errors(errors)],
        "settings": {
            "Study": options.model_dump(mode="json"),
            "Probe": config.read(options.probe.fname, options.probe.overrides),
        },
    }


def collect(options: Options) -> list[Result]:
    """Every single result of the study's folders."""
    results = []
    for fold in options.folds:
        for encoder in pretrained_encoders(options) + random_encoders(options):
            folder = probe_folder(options, fold, encoder)
            results += [
                _result(
                    _read(folder / _task_name(head, task) / f"seed-{seed}" / "results.json"),
                    row=encoder.row, head=head, task=task, seed=encoder.seed, head_seed=seed, fold=fold,
                    init_std=encoder.init_std,
                )
                for head in options.probe.heads
                for task in options.tasks
                for seed in options.probe.seeds
            ]  # fmt: skip
        if options.supervised is not None:
            results += [
                _result(
                    _read(supervised_folder(options, fold, seed, task) / "results.json"),
                    row="supervised", head="probe", task=task, seed=seed, head_seed=seed, fold=fold,
                )
                for task in options.tasks
                for seed in options.supervised.seeds
            ]  # fmt: skip
        if options.floors is not None:
            measured = _read(floors_folder(options, fold) / "results.json")["floors"]
            results += [
                _result(
                    measured[kind][task][str(seed)],
                    row=f"floor_{kind}", head="probe", task=task, seed=0, head_seed=seed, fold=fold,
                )
                for kind in options.floors.kinds
                for task in options.tasks
                for seed in options.probe.seeds
            ]  # fmt: skip
    return results


def _result(measured: dict[str, Any], **of: Any) -> Result:
    return Result(top1=measured["top1"], count=measured["num_val"], **of)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def notes(options: Options) -> list[str]:
    """How to read the table."""
    pretrain, probe, scales = options.pretrain, options.probe, options.random
    few = {name: task.labels_per_class for name, task in options.tasks.items() if task.labels_per_class is not None}
    found = [
        f"pretrained: {len(pretrain.seeds)} pretraining seed(s) × {len(probe.seeds)} read-out seed(s); random: "
        f"{len(scales.seeds)} seed(s) × {len(probe.seeds)} read-out seed(s) at each initialisation scale. ± is the "
        "sample standard deviation of single runs.",
        f"random encoders were drawn with weights of standard deviation {', '.join(map(str, scales.init_stds))}; the "
        "first is the encoder's own initialisation. The best was chosen for each column in hindsight, on the test "
        "clips, which favours the random encoder.",
        "All rows of a column use the same labelled training clips of a seed, and the same test clips.",
    ]
    if few:
        listed = ", ".join(f"{name}: {count}" for name, count in few.items())
        found.append(f"Labelled clips a class, drawn anew for each read-out seed: {listed}.")
    if pretrain.later_overrides and len(pretrain.seeds) > 1:
        found.append(
            f"The pretrainings of seeds {', '.join(map(str, pretrain.seeds[1:]))} are smaller than the one shown: "
            f"{' '.join(pretrain.later_overrides)}."
        )
    if len(options.folds) > 1:
        found.append(
            f"{len(options.folds)} folds, each with its own pretraining; accuracy is pooled over all their test videos."
        )
    return found


def _notes_on_errors(errors: dict[str, Any]) -> list[str]:
    """How far the pretrained row would move with other test videos."""
    found = errors["probe"]["pretrained"] if "pretrained" in errors.get("probe", {}) else {}
    listed = ", ".join(f"{task} {error:.1f}" for task, error in found.items())
    if not listed:
        return []
    return [f"One standard error of the pretrained probe, from the number of test videos alone, in points: {listed}."]


if __name__ == "__main__":
    main()
