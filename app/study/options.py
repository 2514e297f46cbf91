"""Options of a study: pretraining, probes, supervised training and non-learned baselines."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tubelet import config
from tubelet.config import Config
from tubelet.config.registry import name_of


class Task(Config):
    """A labelled data set. `{folder}` and `{fold}` in the paths are replaced."""

    train: str
    test: str
    num_classes: int = Field(ge=2)
    labels_per_class: int | None = Field(None, ge=1)
    """Labelled clips per class, sampled again for each seed of a probe; by default all."""


class Program(Config):
    """A YAML file of a program, the seeds to run it with, and overrides (`key.path=value`)."""

    fname: str
    seeds: list[int] = Field([0], min_length=1)
    overrides: list[str] = []


class Pretrain(Program):
    seeds: list[int] = [0]
    """Empty: only random encoders, supervised training and baselines."""
    later_overrides: list[str] = []
    """Overrides of all runs except the first seed's, e.g. to make them smaller. The report mentions them."""


class Supervised(Program):
    per_task: dict[str, list[str]] = {}
    """Further overrides for single tasks, e.g. more epochs if there are few labels."""


class Random(Config):
    init_stds: list[float] = Field([0.02, 0.06, 0.12], min_length=1)
    """Standard deviations of the initial weights; the first is the default of the encoder."""
    seeds: list[int] = [0]


class Probe(Program):
    heads: list[Literal["probe", "linear"]] = Field(["probe", "linear"], min_length=1)
    linear: dict[str, Any] = {}
    """Options that differ for the linear probe."""


class Baselines(Config):
    """Baselines that need no network."""

    kinds: list[Literal["frame", "difference", "metadata"]] = Field(["frame", "difference"], min_length=1)
    num_frames: int = Field(16, ge=2)
    average: bool = True


class Seconds(Config):
    """Estimates for the progress bar: seconds of one job of each stage; corrected by measured times."""

    pretrain: float = 300
    probe: float = 60
    supervised: float = 60
    baselines: float = 20


class Options(Config):
    folder: str
    title: str = "Tubelet study"
    data: str | None = None
    """Folder of an external data set; `lists` names the module in tubelet/data that writes its lists."""
    lists: name_of("data", "write_lists") | None = None
    folds: list[int] = Field([0], min_length=1)
    """Each fold has its own pretraining, without its test clips."""
    clips: dict[str, int] | None = None
    """Arguments of `python -m tubelet.data.generated`, which generates clips in `<folder>/clips`."""
    cache: str | None = None
    """Folder of decoded clips that all programs share, for small data sets; by default as in their YAML files."""
    pretrain: Pretrain
    random: Random = Random()
    tasks: dict[str, Task] = Field(min_length=1)
    headline: str | None = None
    """The task of the report's conclusion; by default the first."""
    probe: Probe
    supervised: Supervised | None = None
    """Encoder and patch sizes are always those of `pretrain`."""
    baselines: Baselines | None = Baselines()
    devices: list[str] = ["cpu"]
    processes: int = Field(2, ge=1)
    """Number of programs that run in parallel."""
    threads: int = Field(1, ge=1)
    """Threads of each program."""
    seconds: Seconds = Seconds()

    @model_validator(mode="after")
    def _check_consistency(self) -> "Options":
        if (self.data is None) != (self.lists is None):
            raise ValueError("data and lists go together: a folder of videos and the module that writes its lists")
        if self.headline is not None and self.headline not in self.tasks:
            raise ValueError(f"headline: '{self.headline}' is no task. {config.nearest(self.headline, self.tasks)}")
        for name in self.supervised.per_task if self.supervised is not None else ():
            if name not in self.tasks:
                raise ValueError(f"supervised.per_task: '{name}' is no task. {config.nearest(name, self.tasks)}")
        return self

    def fill(self, text: str, fold: int) -> str:
        """Replace `{folder}` and `{fold}` in the text."""
        return text.replace("{folder}", self.folder).replace("{fold}", str(fold))
