"""Sections of a study's YAML."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tubelet.config import Config
from tubelet.probing.label_subset import LabelSubset


class Task(LabelSubset):
    """Labelled clips, and how many of the labels are used. `{folder}` and `{fold}` in the paths are replaced."""

    train: str
    """List of the training clips."""
    test: str
    """List of the test clips."""
    num_classes: int = Field(ge=2)
    """Number of classes."""
    heads: list[str] | None = None
    """Those of `probe.heads` that read this task; by default all."""

    @property
    def labels(self) -> dict[str, int | float]:
        """The options of `data` that select the labelled clips."""
        given = {name: getattr(self, name) for name in LabelSubset.model_fields}
        return {name: value for name, value in given.items() if value is not None}


class GeneratorArguments(Config):
    """Arguments of a program that generates a data set. It has the same defaults for those that are not given."""

    def given(self) -> dict[str, int | bool]:
        """Return the arguments that are given."""
        return self.model_dump(exclude_unset=True)

    def command_line(self) -> list[str]:
        """Return the given arguments as the program reads them."""
        words = []
        for key, value in self.given().items():
            option = key.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [f"--{option}", str(value)]
        return words


class Clips(GeneratorArguments):
    """Generated clips: the arguments of `python -m tubelet.data.generated`."""

    clips: int = Field(4000, ge=0)
    """Clips without labels."""
    train: int = Field(800, ge=0)
    """Labelled clips for training a probe."""
    test: int = Field(800, ge=0)
    """Labelled clips for testing it."""
    frames: int = Field(16, ge=1)
    """Frames of a clip."""
    size: int = Field(64, ge=1)
    """Height and width in pixels."""
    fps: int = Field(12, ge=1)
    """Frames per second."""
    seed: int = 0
    """Seed of all draws."""


class Program(Config):
    """A YAML file of a program, the seeds to run it with, and overrides (`key.path=value`)."""

    fname: str
    """YAML of the program."""
    seeds: list[int] = Field([0], min_length=1)
    """Each is run."""
    overrides: list[str] = []
    """Changes to the YAML, `key.path=value`."""


class Teacher(Config):
    """The frozen teacher of an objective: the encoder of another objective of the study, of the same fold and seed."""

    objective: str
    """Name of the other objective."""
    share: float | None = Field(None, gt=0, lt=1)
    """Fraction of the compute that a shorter run for the teacher alone gets; the student gets the rest. null, only
    without `compute`: the teacher is the other objective's own run."""


class Objective(Config):
    """A pretraining. Its name is its row in the report."""

    fname: str
    """YAML of the pretraining."""
    overrides: list[str] = []
    """`{teacher}` in them is replaced by the run folder of the teacher."""
    teacher: Teacher | None = None


class Pretrain(Config):
    """What the pretrainings of all objectives have in common."""

    seeds: list[int] = [0]
    """Empty: only random encoders, supervised training and baselines."""
    overrides: list[str] = []
    """Applied before those of the objective, e.g. the videos, and the size of the encoder."""


class Compute(Config):
    """Floating-point operations of each pretraining, its teacher's included.

    `optimization.ipe` follows from them and from a measured step; the number of epochs is that of the YAML.
    """

    reference: str | None = None
    """Objective that has the number of steps of its YAML; the others get as many operations."""
    flops: float | None = Field(None, gt=0)
    """The number of operations itself."""

    @model_validator(mode="after")
    def _one_budget(self) -> "Compute":
        if (self.reference is None) == (self.flops is None):
            raise ValueError("compute: give either `reference`, an objective, or `flops`, a number")
        return self


class Curves(Config):
    """Accuracy over the clips seen: probes of checkpoints from the runs of the first pretraining seed."""

    task: str | None = None
    """By default the headline."""
    head: str = "linear_slots"
    """Head of the probes."""
    points: list[float] = Field([0.125, 0.25, 0.5], min_length=1)
    """Fractions of a run after which its encoder is probed; its end always is."""

    @model_validator(mode="after")
    def _within_the_run(self) -> "Curves":
        if not all(0 < point < 1 for point in self.points):
            raise ValueError(f"points: fractions of a run lie between 0 and 1, got {self.points}")
        return self


class Random(Config):
    init_stds: list[float] = Field([0.02, 0.06, 0.12], min_length=1)
    """Standard deviations of the initial weights; the first is the default of the encoder."""
    seeds: list[int] = [0]
    """Seeds of the weights, for each standard deviation."""


class Probe(Program):
    heads: list[str] = Field(["attentive", "linear"], min_length=1)
    """Read-outs of a frozen encoder: heads of tubelet/probing/heads."""
    per_head: dict[str, dict[str, Any]] = {}
    """Options of the probe that differ for single heads."""


class Supervised(Program):
    """Training of the encoder and a head with labels, from scratch."""

    tasks: list[str] | None = None
    """By default all."""
    per_task: dict[str, list[str]] = {}
    """Further overrides for single tasks, e.g. more epochs if there are few labels."""


class FineTuning(Supervised):
    """The same from each pretrained encoder."""

    objectives: list[str] | None = None
    """By default all."""


class Baselines(Config):
    """Baselines that need no network."""

    kinds: list[Literal["frame", "difference", "metadata"]] = Field(["frame", "difference"], min_length=1)
    """Inputs of the logistic regression."""
    num_frames: int = Field(16, ge=2)
    """Frames, evenly spaced over the video, between which differences are taken."""
    average: bool = True
    """Average the differences over time."""


class Seconds(Config):
    """Estimates for the progress bar: seconds of one job of each stage; corrected by measured times."""

    pretrain: float = 300
    """Of a pretraining."""
    probe: float = 60
    """Of a probe."""
    curve: float = 15
    """Of a probe of a checkpoint for the curves."""
    supervised: float = 60
    """Of a training from scratch."""
    finetune: float = 60
    """Of a fine-tuning."""
    baselines: float = 20
    """Of the baselines."""
