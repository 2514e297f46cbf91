"""Resample sound such that a part of it is resampled as in the whole: output sample m is at second m / rate."""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

ZERO_CROSSINGS = 16
"""Of the filter, on each side."""
ROLLOFF = 0.95
"""End of the passband, as a fraction of the lower one of the two Nyquist frequencies."""
KAISER_BETA = 8.6


def span_needed(first: int, length: int, rate_in: int, rate_out: int) -> tuple[int, int]:
    """Return the input samples, first and end, from which output samples `first` to `first + length - 1` follow."""
    if rate_in == rate_out:
        return first, first + length
    up, down, half = _ratio(rate_in, rate_out)
    start = first // up * down - half + 1
    return start, (first + length - 1) // up * down - half + 1 + _filters(rate_in, rate_out).shape[-1]


def resample(sound: np.ndarray, first: int, length: int, rate_in: int, rate_out: int) -> np.ndarray:
    """Return output samples `first` to `first + length - 1` [channels, length], by a windowed sinc filter.

    Args:
        sound: float32 [channels, samples], the input samples of `span_needed`.
        first: Number of the first output sample; sample 0 of input and output are at the same time.
        length: Number of output samples.
        rate_in, rate_out: Samples per second.
    """
    if rate_in == rate_out:
        return sound
    up, down, _ = _ratio(rate_in, rate_out)
    periods = F.conv1d(torch.from_numpy(sound)[:, None], _filters(rate_in, rate_out), stride=down)
    skipped = first % up
    return periods.transpose(1, 2).flatten(1)[:, skipped : skipped + length].numpy()


def _ratio(rate_in: int, rate_out: int) -> tuple[int, int, int]:
    """Return factor and divisor of the rate without common divisors, and half of the number of taps."""
    common = math.gcd(rate_in, rate_out)
    return rate_out // common, rate_in // common, math.ceil(ZERO_CROSSINGS * max(1.0, rate_in / rate_out))


@functools.lru_cache(8)
def _filters(rate_in: int, rate_out: int) -> torch.Tensor:
    """Return filters [up, 1, taps]: filter p gives output sample q * up + p from the inputs from q * down on."""
    up, down, half = _ratio(rate_in, rate_out)
    cutoff = ROLLOFF * min(1.0, rate_out / rate_in)
    position, phase = np.divmod(np.arange(up) * down, up)
    time = np.arange(1 - half, half + 1) - phase[:, None] / up
    taps = np.sinc(cutoff * time) * np.i0(KAISER_BETA * np.sqrt(np.clip(1 - (time / half) ** 2, 0, None)))
    filters = np.zeros((up, 2 * half + position[-1]), np.float32)
    np.put_along_axis(filters, position[:, None] + np.arange(2 * half), taps / taps.sum(1, keepdims=True), axis=1)
    return torch.from_numpy(filters)[:, None]
