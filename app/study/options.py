"""Options of a study: what is pretrained, probed, trained with labels and measured without a network."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tubelet import config
from tubelet.config import Config
from tubelet.config.registry import name_of


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
    seeds: list[int] = [0]
    """None: random encoders, supervised training and floors alone."""
    later_overrides: list[str] = []
    """Changes to all runs but the first seed's, for smaller ones. The report says so."""


class Supervised(Program):
    per_task: dict[str, list[str]] = {}
    """Further changes for single tasks, as more epochs where there are few labels."""


class Random(Config):
    init_stds: list[float] = Field([0.02, 0.06, 0.12], min_length=1)
    """Standard deviations of random encoders' weights; the first is the encoder's own."""
    seeds: list[int] = [0]


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

    pretrain: float = 300
    probe: float = 60
    supervised: float = 60
    floors: float = 20


class Options(Config):
    folder: str
    title: str = "Tubelet study"
    data: str | None = None
    """Folder of a set that is not ours; `lists` names the file of tubelet/data that writes its lists."""
    lists: name_of("data", "write_lists") | None = None
    folds: list[int] = Field([0], min_length=1)
    """Each fold is pretrained on its own, so that no test clip is ever seen."""
    clips: dict[str, int] | None = None
    """Arguments of `python -m tubelet.data.generated`, which makes clips in `<folder>/clips`."""
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
        for name in self.supervised.per_task if self.supervised is not None else ():
            if name not in self.tasks:
                raise ValueError(f"supervised.per_task: '{name}' is no task. {config.nearest(name, self.tasks)}")
        return self

    def fill(self, text: str, fold: int) -> str:
        return text.replace("{folder}", self.folder).replace("{fold}", str(fold))
