"""Numbers of tokens to which masks are cut in all processes of a run alike."""

import math

import numpy as np


def expected_minimum(values: np.ndarray, batch_size: int) -> float:
    """Estimate the expected minimum of `batch_size` draws from a distribution.

    Args:
        values: At least `batch_size` draws from the distribution.
        batch_size: Number of draws whose minimum is taken.

    Returns:
        The mean of the minimum over all subsets of `batch_size` of the values, which is unbiased.
    """
    candidates = np.sort(values)[: len(values) - batch_size + 1]
    # Of a random subset that has none of the i smallest values, this fraction has the next one.
    next_one = batch_size / (len(values) - np.arange(len(candidates)))
    none_before = np.cumprod(np.concatenate([[1.0], 1 - next_one[:-1]]))
    return float(candidates @ (none_before * next_one))


def round_at_random(value: float, step: int, low: int, high: int, chance: float) -> int:
    """Round to one of the neighbouring multiples of `step`, such that the mean is `value`.

    Args:
        value: Number from `low` to `high`.
        step: Distance of the multiples.
        low: Takes the place of a multiple below it.
        high: Takes the place of a multiple above it.
        chance: Uniform draw from [0, 1). Rounds up if it is less than the fraction of the way to the upper neighbour.
    """
    below = math.floor(value / step) * step
    lower, upper = max(below, low), min(below + step, high)
    return upper if chance * (upper - lower) < value - lower else lower
