"""Multi-block masks of generated options and grids, against masks that are drawn one at a time."""

import numpy as np
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from benchmarks.one_mask_at_a_time import cut_at_the_end, masks_one_at_a_time, numpy_draws
from tests.properties import bounded
from tubelet.masks.multiblock3d import MaskCollator, MaskConfig

BATCH = 4


def ranges(low, high):
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(sorted).map(tuple)


CONFIGS = st.builds(
    MaskConfig,
    spatial_scale=ranges(0.05, 0.9),
    temporal_scale=ranges(0.2, 1.0) | st.just((1.0, 1.0)),
    aspect_ratio=ranges(0.3, 3.0),
    num_blocks=st.integers(1, 5),
    max_temporal_keep=st.floats(0.3, 1.0) | st.just(1.0),
    max_keep=st.none() | st.integers(1, 60),
    full_complement=st.booleans(),
    inv_block=st.booleans(),
)
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8))


def collator_of(config, grid, truncate):
    try:
        return MaskCollator([config], (grid[1] * 16, grid[2] * 16), grid[0] * 2, truncate=truncate)
    except ValueError:  # such masks cannot be drawn on this grid
        reject()


@bounded(40)
@given(config=CONFIGS, grid=GRIDS, seed=st.integers(0, 99), truncate=st.sampled_from(["random", "first"]))
def test_context_and_target_are_disjoint_sorted_and_equally_long(config, grid, seed, truncate):
    collator = collator_of(config, grid, truncate)
    (context,), (target,) = collator.sample_masks(BATCH, np.random.default_rng(seed))
    if config.inv_block:
        context, target = target, context
    num_tokens = grid[0] * grid[1] * grid[2]
    assert context.shape[1] >= 1
    assert config.max_keep is None or context.shape[1] <= config.max_keep
    for tokens in (context, target):
        assert (tokens.diff(dim=1) > 0).all()
        assert ((tokens >= 0) & (tokens < num_tokens)).all()
    for row in torch.cat([context, target], dim=1):
        assert len(row.unique()) == len(row)
    if config.full_complement:
        assert context.shape[1] + target.shape[1] == num_tokens
    if collator.draws_tubes:
        for tokens in (context, target):
            slots = torch.zeros(BATCH, num_tokens).scatter(1, tokens, 1.0).view(BATCH, grid[0], -1)
            assert (slots == slots[:, :1]).all(), "all time slots keep the same positions"


@bounded(25)
@given(config=CONFIGS, grid=GRIDS, seed=st.integers(0, 99))
def test_truncate_first_is_the_cut_of_masks_drawn_one_at_a_time(config, grid, seed):
    area = int(grid[1] * grid[2] * config.spatial_scale[0])
    if not area * config.aspect_ratio[0] > 0.25 < area / config.aspect_ratio[1]:
        reject()  # the sides of V-JEPA's blocks may be rounded to 0, ours are at least one token
    collator = collator_of(config, grid, "first")
    (context,), (target,) = collator.sample_masks(BATCH, np.random.default_rng(seed))
    config = collator.configs[0]
    draws, places = numpy_draws(np.random.default_rng(seed)), []

    def below(n):
        places.append(draws.below(n))
        return places[-1]

    uncut = masks_one_at_a_time(config, collator.grid, BATCH, draws._replace(below=below))
    if len(places) > 3 * config.num_blocks * BATCH:
        reject()  # samples without context are drawn again, here one after the other, by the collator all at the end
    expected = cut_at_the_end(config, collator.grid, *uncut)
    for ours, theirs in zip((context, target), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
