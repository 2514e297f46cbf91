"""Schedules as pure functions of the step: a resumed run needs nothing but the step to go on."""

import math


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
