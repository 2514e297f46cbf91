"""The measured cost of a training step against a count by hand."""

import pytest

from app.study import cost
from app.vjepa.options import Options
from tubelet import config
from tubelet.data.mask_draws import draw_masks
from tubelet.runtime.distributed import World

CLIPS, TOKENS, PIXELS = 4, 64, 3 * 2 * 8 * 8
WIDTH, DEPTH, NARROW = 48, 2, 24


def blocks(tokens, width, depth):
    """Multiplications of a forward pass: queries, keys, values, output, MLP, and the two products of attention."""
    return depth * (tokens * width**2 * (3 + 1 + 4 + 4) + 2 * tokens**2 * width)


def step(contexts, targets):
    """Multiplications of a step of V-JEPA for a clip; the backward pass takes twice the forward pass."""
    products = TOKENS * PIXELS * WIDTH + blocks(TOKENS, WIDTH, DEPTH)  # target encoder, without gradients
    for context, target in zip(contexts, targets, strict=True):
        products += 2 * context * PIXELS * WIDTH  # pixels need no gradient
        products += 3 * blocks(context, WIDTH, DEPTH)
        products += 3 * (context * WIDTH * NARROW + blocks(context + target, NARROW, 1) + target * NARROW * WIDTH)
    return products


def test_operations_of_a_step_are_the_sum_over_its_parts(small):
    options = config.load(small(), (), Options)
    measured = cost.measure(options, World())
    expected = []
    for number in range(cost.COUNTED_STEPS):
        seed, collator = options.meta.seed, options.mask_collator()
        masks = draw_masks(collator, CLIPS, seed=seed, step=number, group=0, lengths="shared")
        expected.append(2 * CLIPS * step(*([mask.shape[1] for mask in part] for part in masks)))
    assert measured["flops"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert measured["clips"] == CLIPS
    assert measured["seconds"] > 0
