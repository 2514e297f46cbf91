"""The jobs of a study: programs of this repository, each a child process with its own folder."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from app.study.options import Options, Program, Task
from tubelet import config
from tubelet.runtime.jobs import Job

PROGRAMS = (
    "app.vjepa.train",
    "app.classification.train",
    "evals.video_classification_frozen.eval",
    "evals.baselines.eval",
    "tubelet.report.page",
)
HEADS = {"probe": "attentive", "linear": "linear"}  # name in the report: name in the YAML


def plan(options: Options) -> list[Job]:
    """All jobs in the order in which they should start: after their dependencies, the longest first."""
    clips = [] if options.clips is None else [clips_job(options.folder, options.clips, options.processes)]
    after = tuple(job.name for job in clips)
    pretrainings = [
        _pretrain_job(options, fold, seed, after) for seed in options.pretrain.seeds for fold in options.folds
    ]
    without_pretraining = [job for fold in options.folds for job in _jobs_without_pretraining(options, fold, after)]
    probes = [_probe_job(options, fold, encoder) for encoder in pretrained_encoders(options) for fold in options.folds]
    rest = sorted([*without_pretraining, *probes], key=lambda job: -job.seconds)
    return [*clips, *pretrainings, *rest]


def _jobs_without_pretraining(options: Options, fold: int, after: tuple[str, ...]) -> list[Job]:
    """Jobs of a fold that do not depend on a pretraining."""
    jobs = []
    if options.supervised is not None:
        jobs += [
            _supervised_job(options, fold, seed, name, after)
            for seed in options.supervised.seeds
            for name in options.tasks
        ]
    jobs += [_probe_job(options, fold, encoder, after) for encoder in random_encoders(options)]
    if options.baselines is not None:
        jobs.append(_baselines_job(options, fold, after))
    return jobs


def run_folder(options: Options, fold: int, seed: int) -> Path:
    """Folder of a pretraining: that of the study for the first fold and seed, which the report shows."""
    folder = Path(options.folder)
    if fold != options.folds[0]:
        folder = folder / "folds" / str(fold)
    return folder if seed == options.pretrain.seeds[0] else folder / "seeds" / str(seed)


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder that is probed. `row` is its row in the report; `init_std` is None for a pretrained one."""

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


def clips_job(folder: str, clips: dict[str, int], processes: int) -> Job:
    """Generates the clips in `<folder>/clips`. `clips`: see the options."""
    arguments = {"folder": Path(folder) / "clips", "processes": processes, **clips}
    command = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    return Job(
        name="clips",
        stage="clips",
        command=("tubelet.data.generated", *command),
        folder=arguments["folder"],
        settings=clips,
        seconds=45,
        keep=True,
        slots=processes,
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
    """Probes of one encoder for all tasks, heads and seeds, which share its features."""
    if encoder.row == "pretrained":
        after = (f"pretrain-fold{fold}-seed{encoder.seed}",)
        pretrain: dict[str, Any] = {"folder": str(run_folder(options, fold, encoder.seed))}
    else:
        architecture, patches = _architecture(options)
        pretrain = {
            "folder": None,
            "checkpoint": "random",
            "encoder": {**architecture, "init_std": encoder.init_std},
            "init_seed": encoder.seed,
            **patches,
        }
    changes = {
        "pretrain": pretrain,
        "meta": {"seed": options.probe.seeds},
        "tasks": {
            task_name(head, name): _task_changes(options, fold, task, head)
            for head in options.probe.heads
            for name, task in options.tasks.items()
        },
    }
    first = next(iter(changes["tasks"].values()))["data"]
    shared = {key: first[key] for key in ("dataset_train", "dataset_val", "num_classes")}
    changes["data"] = shared | _cache(options) | _normalization(options)
    folder = probe_folder(options, fold, encoder)
    return _yaml_job(options, "probe", f"probe-fold{fold}-{encoder.name}", fold, options.probe, changes, folder, after)


def probe_folder(options: Options, fold: int, encoder: Encoder) -> Path:
    return Path(options.folder) / "probes" / f"fold{fold}" / encoder.name


def task_name(head: str, task: str) -> str:
    return f"{task}-{head}"


def _task_changes(options: Options, fold: int, task: Task, head: str) -> dict[str, Any]:
    changes = options.probe.linear if head == "linear" else {}
    return {
        **changes,
        "head": {"name": HEADS[head]},
        "data": {**changes.get("data", {}), **_labelled(options, fold, task)},
    }


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


def _pretraining(options: Options) -> dict[str, Any]:
    """The YAML of the pretraining with the overrides of the study."""
    return config.read(options.pretrain.fname, [options.fill(c, options.folds[0]) for c in options.pretrain.overrides])


def _normalization(options: Options) -> dict[str, Any]:
    """The normalization of the pretraining, which random encoders and supervised training use, too."""
    section = _pretraining(options).get("data_aug") or {}
    return {key: section[key] for key in ("normalize_mean", "normalize_std") if key in section}


def _architecture(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section `encoder` of the pretraining's YAML, and its sizes of patches."""
    raw = _pretraining(options)
    return raw.get("encoder", {}), {
        key: raw["data"][key] for key in ("patch_size", "tubelet_size") if key in raw["data"]
    }


def _supervised_job(options: Options, fold: int, seed: int, name: str, after: tuple[str, ...]) -> Job:
    encoder, patches = _architecture(options)
    labelled = _labelled(options, fold, options.tasks[name])
    changes = {"data": {**labelled, **patches, **_normalization(options)}, "encoder": encoder, "meta": {"seed": seed}}
    folder = supervised_folder(options, fold, seed, name)
    program = options.supervised.model_copy(
        update={"overrides": options.supervised.overrides + options.supervised.per_task.get(name, [])}
    )
    job = f"supervised-fold{fold}-{name}-{seed}"
    planned = _yaml_job(options, "supervised", job, fold, program, changes, folder, after)
    if labelled["labels_per_class"] is not None:  # fewer labels, fewer steps
        planned = replace(planned, seconds=planned.seconds / 3)
    return planned


def supervised_folder(options: Options, fold: int, seed: int, name: str) -> Path:
    return Path(options.folder) / "supervised" / f"fold{fold}" / name / f"seed-{seed}"


def _baselines_job(options: Options, fold: int, after: tuple[str, ...]) -> Job:
    tasks = {
        name: {**task.model_dump(), "train": options.fill(task.train, fold), "test": options.fill(task.test, fold)}
        for name, task in options.tasks.items()
    }
    changes = {
        "eval_name": "baselines",
        "kinds": options.baselines.kinds,
        "num_frames": options.baselines.num_frames,
        "average": options.baselines.average,
        "tasks": tasks,
        "seeds": options.probe.seeds,
    }
    return _yaml_job(
        options, "baselines", f"baselines-fold{fold}", fold, None, changes, baselines_folder(options, fold), after
    )


def baselines_folder(options: Options, fold: int) -> Path:
    return Path(options.folder) / "baselines" / f"fold{fold}"


def _yaml_job(
    options: Options,
    stage: Literal["probe", "supervised", "baselines"],
    name: str,
    fold: int,
    program: Program | None,
    changes: dict[str, Any],
    folder: Path,
    after: tuple[str, ...],
) -> Job:
    """A job with its settings in `<folder>.yaml`, whose `base` is the YAML of the program."""
    fname = folder.with_name(f"{folder.name}.yaml")
    changes = {"folder": str(folder), **changes}
    if program is not None:
        changes = {"base": os.path.relpath(program.fname, fname.parent), **changes}
    fname.parent.mkdir(parents=True, exist_ok=True)
    fname.write_text(yaml.safe_dump(changes, sort_keys=False), encoding="utf-8")
    overrides = [options.fill(change, fold) for change in program.overrides] if program is not None else []
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
