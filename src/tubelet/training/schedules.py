"""Schedules as pure functions of the step: a resumed run needs nothing but the step to go on."""

import math
from typing import Annotated

from pydantic import Field

from tubelet.config import Config

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class RateConfig(Config):
    """What every section `optimization` has: AdamW's learning rate over the run, and its weight decay."""

    lr: Positive
    """After the warm-up."""
    start_lr: NotNegative
    final_lr: NotNegative
    warmup: NotNegative
    """Epochs of linear warm-up."""
    weight_decay: NotNegative

    def learning_rate(self, step: float, steps_per_epoch: int, total: float) -> float:
        """Of step `step`: linear warm-up, then half a cosine to `final_lr` at step `total`."""
        return warmup_cosine(step, self.warmup * steps_per_epoch, total, self.start_lr, self.lr, self.final_lr)

    def check_warmup(self, length: float, unit: str = "epochs") -> None:
        """Raises ValueError where the warm-up takes more than the `length` of the run."""
        if self.warmup > length:
            raise ValueError(f"warmup: {self.warmup} {unit} of warm-up do not fit into {length} {unit}")


def linear(step: float, total: float, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at `total` and after."""
    return start + (end - start) * min(1.0, step / max(1.0, total))


def cosine(step: float, total: float, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at `total` and after."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1.0, total))))


def warmup_cosine(step: float, warmup: float, total: float, start: float, peak: float, final: float) -> float:
    """Linear from `start` to `peak` over `warmup` steps, then half a cosine to `final` at `total`."""
    if step < warmup:
        return linear(step, warmup, start, peak)
    return cosine(step - warmup, total - warmup, peak, final)
