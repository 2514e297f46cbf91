"""Every random draw is a pure function of what it is for, so that a resumed run continues bit for bit."""

import enum
import hashlib

import numpy as np
import torch


class Purpose(enum.IntEnum):
    """Separates the draws of `numpy_generator` for one purpose from those for another with the same key.

    A purpose always comes with a key of the same length: numpy ignores zeros at the end of a key.
    """

    PASS_ORDER = 1
    SOURCE_ORDER = 2
    CLIP = 3
    REPLACEMENT = 4
    MASKS = 5
    GENERATED_LABELS = 6
    GENERATED_CLIP = 7
    DURATION_OFFSET = 8
    MASK_LENGTHS = 9
    SCENE_ATTRIBUTES = 10
    SCENE = 11
    QUESTIONS = 12
    DIGIT_CLIP = 13


def numpy_generator(seed: int, purpose: Purpose, *key: int) -> np.random.Generator:
    """A numpy generator for data: which samples, which clips, which masks.

    Example:
        >>> numpy_generator(run_seed, Purpose.MASKS, step, group)
    """
    return np.random.default_rng((seed, int(purpose), *key))


def torch_generator(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator seeded by `seed_for(*key)`."""
    return torch.Generator(device).manual_seed(seed_for(*key))


def seed_for(*key: int | str) -> int:
    """A 63-bit seed that depends on the whole key.

    Example:
        >>> torch.manual_seed(seed_for(run_seed, step, rank, "dropout"))
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
