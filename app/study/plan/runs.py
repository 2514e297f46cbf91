"""The pretrainings of a study: their folders, overrides and configurations."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.study.options import Options
from tubelet import config


@dataclass(frozen=True)
class Run:
    """A pretraining.

    Args:
        objective: What is learned.
        fold: Fold of the data set.
        seed: Seed of the run.
        student: The objective that this run is the teacher of; None for a row of the report.
    """

    objective: str
    fold: int
    seed: int
    student: str | None = None

    @property
    def name(self) -> str:
        what = self.objective if self.student is None else f"teacher-of-{self.student}"
        return f"pretrain-fold{self.fold}-{what}-{self.seed}"

    def folder(self, study: Options) -> Path:
        """Return the folder: that of the study for the first objective, fold and seed, which the report shows."""
        if self.student is not None:
            return Run(self.student, self.fold, self.seed).folder(study) / "teacher"
        folder = Path(study.folder)
        if self.objective != next(iter(study.objectives)):
            folder = folder / "objectives" / self.objective
        if self.fold != study.folds[0]:
            folder = folder / "folds" / str(self.fold)
        return folder if self.seed == study.pretrain.seeds[0] else folder / "seeds" / str(self.seed)


def runs(study: Options) -> list[Run]:
    """Return the pretrainings of all rows."""
    seeds = study.pretrain.seeds
    return [Run(name, fold, seed) for seed in seeds for fold in study.folds for name in study.objectives]


def teacher_of(study: Options, run: Run) -> Run | None:
    """Return the run whose encoder is the teacher of a run."""
    teacher = study.objectives[run.objective].teacher
    if teacher is None or run.student is not None:
        return None
    student = None if teacher.share is None else run.objective
    return Run(teacher.objective, run.fold, run.seed, student)


def overrides_of(study: Options, run: Run, teacher_folder: Path | None = None) -> list[str]:
    """Return the overrides of a run, except its folder and seed: those of the study, then those of its objective.

    Args:
        teacher_folder: Where the teacher is; by default the folder of its run.
    """
    objective = study.objectives[run.objective]
    changes = [study.fill(change, run.fold) for change in (*study.pretrain.overrides, *objective.overrides)]
    if teacher_folder is None and (teacher := teacher_of(study, run)) is not None:
        teacher_folder = teacher.folder(study)
    if objective.teacher is not None:
        changes = [change.replace("{teacher}", str(teacher_folder)) for change in changes]
    return [*changes, *(f"data.cache={path}" for path in cache(study).values())]


def settings_of(study: Options, run: Run) -> dict[str, Any]:
    """Return the configuration of a run, except its folder and seed."""
    return read(study.objectives[run.objective].fname, tuple(overrides_of(study, run)))


@functools.cache
def read(fname: str, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a YAML file with its bases, which takes 20 ms; hundreds of jobs have the same few. Not to be changed."""
    return config.read(fname, overrides)


def cache(study: Options) -> dict[str, str]:
    """Return the option of `data` for the folder of decoded videos, if the study has one."""
    return {} if study.cache is None else {"cache": study.fill(study.cache, study.folds[0])}
