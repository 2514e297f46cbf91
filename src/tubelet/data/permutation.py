"""Random orders of any length, of which any part can be computed alone."""

from typing import Protocol

import numpy as np

from tubelet.runtime.seeds import Purpose, numpy_generator

MAX_STORED = 1 << 18
"""Longest order that is kept in memory, 2 MB of each worker. Longer ones are computed where they are needed."""
ROUNDS = 6


class Order(Protocol):
    """A permutation: `order[positions]` are the items at these positions, int64."""

    def __getitem__(self, positions: np.ndarray) -> np.ndarray: ...


def random_order(length: int, seed: int, purpose: Purpose, *key: int) -> Order:
    """Return a random permutation of 0 .. length - 1, a function of the arguments."""
    rng = numpy_generator(seed, purpose, *key)
    return rng.permutation(length) if length <= MAX_STORED else ComputedOrder(length, rng)


class ComputedOrder:
    """A pseudorandom permutation without memory: a Feistel network on the bits of the position (Luby & Rackoff 1988).

    It permutes 0 .. 4^k - 1, where 4^k is at most four times the length; an item beyond the length is permuted again
    until it is below (cycle walking, Black & Rogaway 2002).
    """

    def __init__(self, length: int, rng: np.random.Generator):
        self._length = length
        self._bits = np.uint64(-(-(length - 1).bit_length() // 2))  # of each half
        self._mask = np.uint64((1 << int(self._bits)) - 1)
        self._keys = rng.integers(0, 2**64, size=ROUNDS, dtype=np.uint64)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        items = self._permute(np.asarray(positions).astype(np.uint64))
        while len(beyond := np.flatnonzero(items >= self._length)):
            items[beyond] = self._permute(items[beyond])
        return items.astype(np.int64)

    def _permute(self, items: np.ndarray) -> np.ndarray:
        left, right = items >> self._bits, items & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return left << self._bits | right


def _mix(values: np.ndarray) -> np.ndarray:
    """Return 64 well mixed bits of each value (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
