"""Folders and YAML files of the jobs that follow a pretraining."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from app.study.options import Options
from app.study.plan.runs import read
from app.study.sections import Program
from tubelet import config
from tubelet.config import shipped
from tubelet.runtime.jobs import Job


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder that is probed. `row` is its row in the report; `init_std` is None for a pretrained one."""

    row: str
    seed: int
    init_std: float | None = None

    @property
    def name(self) -> str:
        return f"{self.row}-{self.seed}" if self.init_std is None else f"{self.row}-{self.init_std}-{self.seed}"


def random_encoders(study: Options) -> list[Encoder]:
    return [Encoder("random", seed, init_std) for seed in study.random.seeds for init_std in study.random.init_stds]


def pretrained_encoders(study: Options) -> list[Encoder]:
    return [Encoder(name, seed) for seed in study.pretrain.seeds for name in study.objectives]


def cost_folder(study: Options, objective: str) -> Path:
    return Path(study.folder) / "costs" / objective


def probe_folder(study: Options, fold: int, encoder: Encoder) -> Path:
    return Path(study.folder) / "probes" / f"fold{fold}" / encoder.name


def curve_folder(study: Options, fold: int, encoder: Encoder, step: int) -> Path:
    return Path(study.folder) / "curves" / f"fold{fold}" / encoder.name / f"step-{step}"


def supervised_folder(study: Options, fold: int, seed: int, task: str) -> Path:
    return Path(study.folder) / "supervised" / f"fold{fold}" / task / f"seed-{seed}"


def finetune_folder(study: Options, fold: int, encoder: Encoder, seed: int, task: str) -> Path:
    return Path(study.folder) / "finetuned" / f"fold{fold}" / encoder.name / task / f"seed-{seed}"


def baselines_folder(study: Options, fold: int) -> Path:
    return Path(study.folder) / "baselines" / f"fold{fold}"


def probe_name(head: str, task: str) -> str:
    """Return the name of the probe of a task among those of its encoder."""
    return f"{task}-{head}"


def yaml_job(
    study: Options,
    stage: str,
    name: str,
    program: Program | None,
    *,
    fold: int,
    changes: dict[str, Any],
    folder: Path,
    after: tuple[str, ...],
    temporary: tuple[str, ...] = (),
) -> Job:
    """Return a job with its settings in `<folder>.yaml`, whose `base` is the YAML of the program."""
    fname = folder.with_name(f"{folder.name}.yaml")
    changes = {"folder": str(folder), **changes}
    overrides: list[str] = []
    settings, source = changes, "probe" if stage == "curve" else stage
    if program is not None:
        overrides = [study.fill(change, fold) for change in program.overrides]
        keys = [f"{source}.overrides"] if overrides else []
        keys += ["probe.per_head"] if source == "probe" and study.probe.per_head else []
        source = ", ".join([*keys, f"{source} ({program.fname})"])
        settings = {**config.merge(read(program.fname), changes), "overrides": overrides}
        changes = {"base": os.path.relpath(shipped.find(program.fname), fname.parent), **changes}
    fname.parent.mkdir(parents=True, exist_ok=True)
    fname.write_text(yaml.safe_dump(changes, sort_keys=False), encoding="utf-8")
    package = "app.main" if stage in ("supervised", "finetune") else "evals.main"
    return Job(
        name=name,
        stage=stage,
        command=(package, "--fname", str(fname), "--devices", study.devices[0], *overrides),
        folder=folder,
        settings={"clips": study.given_clips, **settings},
        seconds=getattr(study.seconds, stage),
        after=after,
        temporary=temporary,
        source=source,
    )
