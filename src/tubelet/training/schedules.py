"""Schedules as pure functions of the step, so that a resumed run continues them from the step alone."""

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from tubelet.config import Config, Pair

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class RateConfig(Config):
    """Learning rate over a run, and weight decay: the part that every section `optimization` has."""

    lr: Positive
    """Learning rate after the warm-up."""
    start_lr: NotNegative
    """Learning rate at the start of the warm-up."""
    final_lr: NotNegative
    """Learning rate at the end of its cosine schedule."""
    warmup: NotNegative
    """Epochs of linear warm-up."""
    weight_decay: NotNegative
    """Weight decay, at the start of its schedule if it has one."""

    def learning_rate(self, position: float, steps_per_epoch: int, total: float) -> float:
        """Return the learning rate: linear warm-up, then half a cosine to `final_lr` at position `total`."""
        return warmup_cosine(position, self.warmup * steps_per_epoch, total, self.start_lr, self.lr, self.final_lr)

    def check_warmup(self, length: float, unit: str = "epochs") -> None:
        """Raise ValueError where the warm-up is longer than the run."""
        if self.warmup > length:
            raise ValueError(
                f"warmup: {self.warmup} {unit} of warm-up do not fit into {length} {unit}; set a smaller warmup, or 0"
            )


class OptimizationConfig(RateConfig):
    """YAML section `optimization` of programs that train: AdamW and its schedules."""

    final_weight_decay: NotNegative | None = None
    """Weight decay at the end of its cosine schedule; null: constant."""
    betas: Pair = (0.9, 0.999)
    """Of AdamW."""
    eps: float = Field(1e-8, gt=0)
    """Of AdamW."""
    clip_grad: float | None = Field(None, gt=0)
    """Largest gradient norm."""
    clip_separately: bool = False
    """Clip the gradients of each part (encoder, predictor) by themselves, as V-JEPA does, instead of all together."""
    clip_start_epoch: float | None = Field(0.0, ge=0)
    """Epoch, counted from 0, from which gradients are clipped; null: after the warm-up."""
    accumulation_steps: int = Field(1, ge=1)
    """Parts that the batch of each process is split into; they run one after another before the optimizer's step."""

    def check_accumulation(self, batch_size: int) -> None:
        """Raise ValueError where the parts of a batch would not have the same size."""
        if batch_size % self.accumulation_steps:
            raise ValueError(
                f"optimization.accumulation_steps: {self.accumulation_steps} does not divide batch_size {batch_size}"
            )


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of each step.

    The convention is V-JEPA's: learning rate and weight decay advance before a step, so step i (from 0) uses position
    i + 1 of their schedules.

    Args:
        options: Values and warm-up.
        last_step: Steps of the run.
        steps_per_epoch: Steps in the unit of `options.warmup`.
        stretch: Factor on the length of the schedules; above 1 training ends before they do.
    """

    options: OptimizationConfig
    last_step: int
    steps_per_epoch: int = 1
    stretch: float = 1.0

    @property
    def length(self) -> float:
        """Steps over which schedules run."""
        return self.last_step * self.stretch

    def lr(self, step: int) -> float:
        return self.options.learning_rate(step + 1, self.steps_per_epoch, self.length)

    def weight_decay(self, step: int) -> float:
        final = self.options.final_weight_decay
        start = self.options.weight_decay
        return start if final is None else cosine(step + 1, self.length, start, final)

    def clip_grad(self, step: int) -> float:
        """Return the largest gradient norm; infinite where gradients are not clipped."""
        start = self.options.warmup if self.options.clip_start_epoch is None else self.options.clip_start_epoch
        limit = self.options.clip_grad
        return limit if limit is not None and step >= start * self.steps_per_epoch else math.inf


def linear(position: float, total: float, start: float, end: float) -> float:
    """Interpolate from `start` at position 0 to `end` at `total`, and stay there."""
    return start + (end - start) * min(1.0, position / max(1.0, total))


def cosine(position: float, total: float, start: float, end: float) -> float:
    """Follow half a cosine from `start` at position 0 to `end` at `total`, and stay there."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, position / max(1.0, total))))


def warmup_cosine(position: float, warmup: float, total: float, start: float, peak: float, final: float) -> float:
    """Increase linearly from `start` to `peak` over `warmup` steps, then follow half a cosine to `final` at `total`."""
    if position < warmup:
        return linear(position, warmup, start, peak)
    return cosine(position - warmup, total - warmup, peak, final)
