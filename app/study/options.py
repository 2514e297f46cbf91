"""Options of a study: objectives of pretraining, what they are compared with, and how, on one or several data sets."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from app.study.sections import (
    Baselines,
    Clips,
    Compute,
    Curves,
    FineTuning,
    Objective,
    Pretrain,
    Probe,
    Random,
    Seconds,
    Supervised,
    Task,
)
from tubelet import config
from tubelet.config import Config, ConfigError
from tubelet.config.registry import part_name
from tubelet.runtime.run_lock import Lock

REFERENCES = ("random", "random_best", "supervised")
"""Rows of the report besides the objectives."""


class Options(Config):
    app: Literal["study"] = "study"
    """Program that the file is for."""
    folder: str
    """Folder of all runs and of the report."""
    title: str = "Tubelet study"
    """Title of the report."""
    datasets: dict[str, dict[str, Any]] | None = None
    """Several data sets: name -> the keys below that differ for it. Each has the folder `<folder>/<name>`. One that has
    `lists`, but no `data`, is left out; null drops one of a base file."""
    data: str | None = None
    """Folder of an external data set; `lists` names the module in tubelet/data that writes its lists."""
    lists: Annotated[str, part_name("data", "write_lists")] | None = None
    """Module of tubelet/data with `write_lists`, for the folder `data`."""
    folds: list[int] = Field([0], min_length=1)
    """Each fold has its own pretraining, without its test clips."""
    clips: Clips | None = None
    """Clips that are generated in `<folder>/clips`."""
    cache: str | None = None
    """Folder of decoded clips that all programs share, for small data sets; by default as in their YAML files."""
    objectives: dict[str, Objective] = Field(min_length=1)
    """Name -> pretraining; null drops one of a base file or of all data sets. Random encoders and supervised training
    have the encoder of the first one."""
    pretrain: Pretrain = Pretrain()
    compute: Compute | None = None
    """Equal compute for all objectives; by default each has the number of steps of its YAML."""
    curves: Curves | None = None
    random: Random = Random()
    """Encoders with random weights, which are probed like the pretrained ones."""
    tasks: dict[str, Task] = {}
    headline: str | None = None
    """The task of the report's conclusion; by default the first."""
    probe: Probe
    """The probe of all encoders."""
    supervised: Supervised | None = None
    finetune: FineTuning | None = None
    baselines: Baselines | None = Baselines()
    devices: list[str] = ["cpu"]
    """Devices of each program, as for `--devices`."""
    processes: int = Field(2, ge=1)
    """Number of programs that run in parallel."""
    threads: int = Field(1, ge=1)
    """Threads of each program."""
    seconds: Seconds = Seconds()

    @field_validator("datasets", "objectives", mode="before")
    @classmethod
    def _drop_null(cls, entries: Any) -> Any:
        if not isinstance(entries, dict):
            return entries
        return {name: entry for name, entry in entries.items() if entry is not None}

    @model_validator(mode="after")
    def _check(self) -> "Options":
        self._check_names_of_heads()  # before the keys that name some of them
        if self.datasets is not None:
            for name in self.datasets:
                self._study(name)
            return self
        if not self.tasks:
            raise ValueError("tasks: required, but not given")
        if self.data is not None and self.lists is None:
            raise ValueError("data and lists go together: a folder of videos and the module that writes its lists")
        for name in REFERENCES:
            if name in self.objectives:
                raise ValueError(f"objectives.{name}: a row of the report has this name already; choose another one")
        self._check_objectives()
        self._check_tasks()
        self._check_heads()
        return self

    def run_locks(self) -> list[Lock]:
        """Return what this program locks. Its children lock their folders, of which one is this one, too."""
        return [Lock(Path(self.folder), name=".lock-study")]

    def studies(self) -> dict[str, "Options"]:
        """Return the study of each data set that is not left out, by name; a single one has the name of its folder."""
        studies = {name: self._study(name) for name in self.datasets or {}} or {Path(self.folder).name: self}
        return {name: study for name, study in studies.items() if not study._lacks_data}

    def left_out(self) -> list[str]:
        """Return the keys that are missing for the data sets that are left out."""
        if self.datasets is None:
            return ["data"] if self._lacks_data else []
        return [f"datasets.{name}.data" for name in self.datasets if self._study(name)._lacks_data]

    @property
    def given_clips(self) -> dict[str, int | bool] | None:
        """The arguments of the generated clips, which all jobs depend on."""
        return None if self.clips is None else self.clips.given()

    @property
    def main_task(self) -> str:
        return self.headline or next(iter(self.tasks))

    @property
    def curve_task(self) -> str:
        return self.main_task if self.curves is None or self.curves.task is None else self.curves.task

    def heads_of(self, task: str) -> list[str]:
        """Return the heads that read a task."""
        return self.tasks[task].heads or self.probe.heads

    def fine_tuned(self) -> list[str]:
        """Return the objectives whose encoders are fine-tuned."""
        if self.finetune is None or not self.pretrain.seeds:
            return []
        return list(self.objectives if self.finetune.objectives is None else self.finetune.objectives)

    def fill(self, text: str, fold: int) -> str:
        """Replace `{folder}` and `{fold}` in the text."""
        return text.replace("{folder}", self.folder).replace("{fold}", str(fold))

    @property
    def _lacks_data(self) -> bool:
        return self.lists is not None and self.data is None

    def _study(self, name: str) -> "Options":
        """Return the options of one of `datasets`."""
        assert self.datasets is not None
        common = self.model_dump(exclude={"datasets"}, exclude_unset=True)
        raw = config.merge(common, {"folder": f"{self.folder}/{name}", "title": name, **self.datasets[name]})
        return config.check_variant(raw, Options, f"datasets.{name}")

    def _check_objectives(self) -> None:
        names = [] if self.compute is None or self.compute.reference is None else [self.compute.reference]
        _check_names("compute.reference", names, self.objectives, "objective")
        if self.finetune is not None:
            _check_names("finetune.objectives", self.finetune.objectives or [], self.objectives, "objective")
        for name, objective in self.objectives.items():
            teacher = objective.teacher
            if teacher is None:
                continue
            key = f"objectives.{name}.teacher"
            _check_names(f"{key}.objective", [teacher.objective], self.objectives, "objective")
            if self.objectives[teacher.objective].teacher is not None:
                raise ValueError(f"{key}.objective: '{teacher.objective}' has a teacher itself; take one that has none")
            if (teacher.share is None) != (self.compute is None):
                raise ValueError(f"{key}.share: with `compute` it is required, without it there is nothing to share")
            if name in names:
                raise ValueError(f"compute.reference: '{name}' has a teacher; take an objective that has none")

    def _check_tasks(self) -> None:
        used: dict[str, Iterable[str]] = {"headline": [self.main_task], "curves.task": [self.curve_task]}
        for key, training in (("supervised", self.supervised), ("finetune", self.finetune)):
            if training is not None:
                used |= {f"{key}.tasks": training.tasks or [], f"{key}.per_task": training.per_task}
        for key, names in used.items():
            _check_names(key, names, self.tasks, "task")

    def _check_names_of_heads(self) -> None:
        from tubelet.probing.heads import HEADS  # imports torch, which `--help` need not wait for

        for name in self.probe.heads:
            options = self.probe.per_head.get(name, {}).get("head")
            try:
                HEADS.locate({**(options if isinstance(options, dict) else {}), "name": name})
            except ConfigError as error:
                raise ValueError(f"probe.heads: {error}") from None

    def _check_heads(self) -> None:
        _check_names("probe.per_head", self.probe.per_head, self.probe.heads, "head of `probe.heads`")
        for name, task in self.tasks.items():
            _check_names(f"tasks.{name}.heads", task.heads or [], self.probe.heads, "head of `probe.heads`")
        if self.curves is not None:
            heads = self.heads_of(self.curve_task)
            _check_names("curves.head", [self.curves.head], heads, f"head that reads the task '{self.curve_task}'")


def _check_names(key: str, names: Iterable[str], valid: Collection[str], what: str) -> None:
    for name in names:
        if name not in valid:
            raise ValueError(f"{key}: '{name}' is no {what}. {config.nearest(name, valid)}")
