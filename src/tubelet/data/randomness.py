"""Random numbers as a pure function of what they are for."""

import enum

import numpy as np


class Purpose(enum.IntEnum):
    """Keeps draws for one purpose apart from those for another with the same key.

    A purpose always comes with a key of the same length: numpy takes a key with zeros added at its end for the same.
    """

    PASS_ORDER = 1
    SOURCE_ORDER = 2
    CLIP = 3
    REPLACEMENT = 4
    MASKS = 5
    GENERATED_LABELS = 6
    GENERATED_CLIP = 7


def generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    return np.random.default_rng((seed, int(purpose), *key))
