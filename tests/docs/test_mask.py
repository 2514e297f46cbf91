"""The example of docs/extending/mask.md keeps the contract of masks, and trains."""

import math

import numpy as np
import pytest

from tests.docs.runs import MASK, make_options, train
from tubelet.config import ConfigError
from tubelet.grid import ClipShape
from tubelet.masks import build_collator

NAME = "ideas.gap"


def test_consecutive_slots_are_hidden(checkout):
    masks = build_collator([{"name": NAME, "length": [0.25, 0.5]}], ClipShape(16, 32, 8, 2))
    starts = set()
    for seed in range(60):
        (context,), (target,) = masks.sample_masks(5, np.random.default_rng(seed), np.random.default_rng(seed))
        (other,), _ = masks.sample_masks(5, np.random.default_rng(seed + 100), np.random.default_rng(seed))
        assert other.shape == context.shape, "the length is drawn from the shared generator"
        assert context.shape[1] + target.shape[1] == 8 * 16
        for seen, hidden in zip(context.tolist(), target.tolist(), strict=True):
            assert sorted(seen + hidden) == list(range(8 * 16))
            assert seen == sorted(seen)
            slots = sorted({index // 16 for index in hidden})
            assert slots == list(range(slots[0], slots[0] + len(hidden) // 16))
            assert 2 <= len(slots) <= 4
            starts.add(slots[0])
    assert starts == set(range(7))


def test_mask_trains(checkout, clips):
    first, last = train(make_options(clips, mask=[NAME, MASK]))
    assert math.isfinite(last["loss"])
    assert last["loss"] != first["loss"]


@pytest.mark.parametrize("length", [[0.5, 0.25], [0.0, 0.5], [0.5, 1.0]])
def test_impossible_lengths_are_errors(checkout, clips, length):
    with pytest.raises(ConfigError, match="no range of fractions"):
        make_options(clips, mask=[{"name": NAME, "length": length}])
