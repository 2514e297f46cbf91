import math

import numpy as np
import pytest
import torch

from benchmarks.one_mask_at_a_time import cut_at_the_end, masks_one_at_a_time, numpy_draws
from tubelet.config import ConfigError, check
from tubelet.masks.multiblock3d import MaskCollator, MaskConfig

SMALL_BLOCKS = {"num_blocks": 8, "spatial_scale": (0.15, 0.15), "aspect_ratio": (0.75, 1.5)}
LARGE_BLOCKS = {"num_blocks": 2, "spatial_scale": (0.7, 0.7), "aspect_ratio": (0.75, 1.5)}
HALF_THE_SLOTS = {"num_blocks": 6, "spatial_scale": (0.2, 0.4), "temporal_scale": (0.5, 0.5)}

CONFIGS = {
    "small blocks": SMALL_BLOCKS,
    "large blocks": LARGE_BLOCKS,
    "blocks of half the slots": HALF_THE_SLOTS,
    "blocks of any length": SMALL_BLOCKS | {"temporal_scale": (0.2, 1.0)},
    "context from the first half": SMALL_BLOCKS | {"max_temporal_keep": 0.5},
    "context from the first half, half the slots": HALF_THE_SLOTS | {"max_temporal_keep": 0.5},
    "at most 100 kept": SMALL_BLOCKS | {"max_keep": 100},
    "full complement": LARGE_BLOCKS | {"full_complement": True},
    "full complement of at most 100": LARGE_BLOCKS | {"full_complement": True, "max_keep": 100},
    "context is the full complement": LARGE_BLOCKS | {"pred_full_complement": True},
    "inverse": SMALL_BLOCKS | {"inv_block": True},
    "inverse, full complement": SMALL_BLOCKS | {"inv_block": True, "full_complement": True},
}


def slots_of(tokens: torch.Tensor, collator: MaskCollator) -> np.ndarray:
    """Number of tokens in each time slot, summed over the batch."""
    return np.bincount(tokens.flatten().numpy() // collator.grid.tokens_per_frame, minlength=collator.grid.t)


def contains(many: torch.Tensor, few: torch.Tensor) -> bool:
    return bool(torch.isin(few, many).all())


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("crop_size", [224, (128, 192)], ids=str)
def test_truncate_first_is_the_cut_of_v_jepa(options, crop_size):
    collator = MaskCollator([options], crop_size, truncate="first")
    for seed in range(5):
        (context,), (target,) = collator.sample_masks(6, np.random.default_rng(seed))
        config = collator.configs[0]
        uncut = masks_one_at_a_time(config, collator.grid, 6, numpy_draws(np.random.default_rng(seed)))
        expected_context, expected_target = cut_at_the_end(config, collator.grid, *uncut)
        torch.testing.assert_close(context, expected_context, rtol=0, atol=0)
        torch.testing.assert_close(target, expected_target, rtol=0, atol=0)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_random_cut_keeps_as_many_tokens_of_the_same_blocks(options):
    options = {key: value for key, value in options.items() if key != "inv_block"}
    collator = MaskCollator([options], truncate="random")
    for seed in range(5):
        (context,), (target,) = collator.sample_masks(6, np.random.default_rng(seed))
        config = collator.configs[0]
        seen, hidden = masks_one_at_a_time(config, collator.grid, 6, numpy_draws(np.random.default_rng(seed)))
        num_context, num_target = min(map(len, seen)), min(map(len, hidden))
        if config.max_keep is not None:
            per_column = collator.grid.t if config.temporal_scale == (1.0, 1.0) else 1
            num_context = min(num_context, config.max_keep // per_column * per_column)
        if config.full_complement:
            num_target = math.prod(collator.grid) - num_context
        if config.pred_full_complement:
            num_context = math.prod(collator.grid) - num_target
        assert context.shape == (6, num_context)
        assert target.shape == (6, num_target)
        for b in range(6):
            assert config.pred_full_complement or contains(seen[b], context[b])
            assert config.full_complement or contains(hidden[b], target[b])


@pytest.mark.parametrize("options", [SMALL_BLOCKS, LARGE_BLOCKS], ids=["8 x 0.15", "2 x 0.7"])
def test_no_time_slot_is_favoured(options):
    """V-JEPA's ViT-L/16 masks: tubes stay whole, so that the slots keep not alike on average but exactly alike."""
    collator = MaskCollator([options])
    rng = np.random.default_rng(0)
    for _ in range(50):
        (context,), (target,) = collator.sample_masks(24, rng)
        for tokens in (context, target):
            by_slot = tokens.reshape(24, collator.grid.t, -1) % collator.grid.tokens_per_frame
            assert (by_slot == by_slot[:, :1]).all()


@pytest.mark.parametrize(("options", "most"), [(SMALL_BLOCKS, (0.1, 0.2)), (LARGE_BLOCKS, (0.1, 0.4))])
def test_the_cut_of_v_jepa_does_favour_the_first_slot(options, most):
    """The fault that the default avoids, so that the test above is known to be able to fail."""
    collator = MaskCollator([options], truncate="first")
    rng = np.random.default_rng(0)
    counts = np.zeros((2, collator.grid.t))
    for _ in range(50):
        (context,), (target,) = collator.sample_masks(24, rng)
        counts += slots_of(context, collator), slots_of(target, collator)
    assert (counts[:, -1] / counts[:, 0] < most).all()


@pytest.mark.parametrize(
    "options",
    [HALF_THE_SLOTS, SMALL_BLOCKS | {"max_temporal_keep": 0.5}, HALF_THE_SLOTS | {"max_keep": 300}],
    ids=["blocks of half the slots", "context from the first half", "at most 300 kept"],
)
def test_every_slot_keeps_the_same_share_where_single_tokens_go(options):
    collator = MaskCollator([options])
    kept, uncut = np.zeros((2, collator.grid.t)), np.zeros((2, collator.grid.t))
    for seed in range(60):
        (context,), (target,) = collator.sample_masks(24, np.random.default_rng(seed))
        seen, hidden = masks_one_at_a_time(
            collator.configs[0], collator.grid, 24, numpy_draws(np.random.default_rng(seed))
        )
        kept += slots_of(context, collator), slots_of(target, collator)
        uncut += slots_of(torch.cat(seen), collator), slots_of(torch.cat(hidden), collator)
    for kept_by_slot, uncut_by_slot in zip(kept, uncut, strict=True):
        share = kept_by_slot[uncut_by_slot > 0] / uncut_by_slot[uncut_by_slot > 0]
        assert share.max() / share.min() < 1.03


def test_random_cut_favours_no_place_in_the_frame():
    collator = MaskCollator([SMALL_BLOCKS])
    kept, uncut = np.zeros((2, 196)), np.zeros((2, 196))
    for seed in range(150):
        masks = collator.sample_masks(24, np.random.default_rng(seed))
        full = masks_one_at_a_time(collator.configs[0], collator.grid, 24, numpy_draws(np.random.default_rng(seed)))
        kept += [np.bincount(tokens.flatten().numpy() % 196, minlength=196) for (tokens,) in masks]
        uncut += [np.bincount(torch.cat(tokens).numpy() % 196, minlength=196) for tokens in full]
    overall = kept.sum(axis=1, keepdims=True) / uncut.sum(axis=1, keepdims=True)
    standard_error = np.sqrt(overall * (1 - overall) / (uncut / collator.grid.t))
    assert (np.abs(kept / uncut - overall) < 5 * standard_error).all()


def test_blocks_have_the_area_and_aspect_of_the_configuration():
    """One block a sample is its own bounding box; its size is drawn once a batch and spans the configured ranges."""
    collator = MaskCollator([{"num_blocks": 1, "spatial_scale": (0.2, 0.6), "aspect_ratio": (0.5, 2.0)}], (320, 320))
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(400):
        _, (target,) = collator.sample_masks(3, rng)
        y, x = target % 400 // 20, target % 20
        height, width = (axis.amax(1) - axis.amin(1) + 1 for axis in (y, x))
        assert target.shape[1] == 8 * height[0] * width[0], "a block is full, and so are its tubes"
        assert (height == height[0]).all()
        assert (width == width[0]).all()
        areas.append(int(height[0] * width[0]) / 400)
        ratios.append(float(height[0] / width[0]))
    rounding = 1.12  # half a patch of five, on both sides
    assert 0.2 / rounding < min(areas) < 0.22
    assert 0.57 < max(areas) < 0.6 * rounding
    assert np.mean(areas) == pytest.approx(0.4, abs=0.02)
    assert 0.5 / rounding < min(ratios) < 0.55
    assert 1.8 < max(ratios) < 2.0 * rounding
    assert np.mean(ratios) == pytest.approx(1.25, abs=0.07)


def test_temporal_scale_is_the_length_of_the_blocks():
    collator = MaskCollator([{"num_blocks": 1, "temporal_scale": (0.3, 0.8), "spatial_scale": (0.3, 0.3)}])
    rng = np.random.default_rng(0)
    lengths = set()
    for _ in range(100):
        _, (target,) = collator.sample_masks(4, rng)
        slots = target // 196
        lengths.update((slots.amax(1) - slots.amin(1) + 1).tolist())
    assert lengths == {2, 3, 4, 5, 6}


def test_places_of_blocks_are_uniform():
    """5 x 5 patches on 14 x 14: ten places on each axis, every one equally likely."""
    collator = MaskCollator([{"num_blocks": 1, "spatial_scale": (0.13, 0.13), "aspect_ratio": (1.0, 1.0)}])
    _, (target,) = collator.sample_masks(20_000, np.random.default_rng(0))
    first = target[:, 0].numpy()
    for places in (np.bincount(first // 14), np.bincount(first % 14)):
        assert len(places) == 10
        assert ((places - 2000) ** 2 / 2000).sum() < 27.9  # chi square of 9 degrees of freedom, 0.1 %


@pytest.mark.parametrize("num_blocks", [1, 2, 5, 20])
def test_number_of_blocks(num_blocks):
    """Blocks of one patch are n throws at 196 places: the expected number of places hit is known."""
    collator = MaskCollator([{"num_blocks": num_blocks, "spatial_scale": (0.006, 0.006), "aspect_ratio": (1.0, 1.0)}])
    rng = np.random.default_rng(0)
    hit = [collator.sample_masks(1, rng)[1][0].shape[1] / 8 for _ in range(500)]
    assert np.mean(hit) == pytest.approx(196 * (1 - (1 - 1 / 196) ** num_blocks), rel=0.01)


def test_max_temporal_keep_leaves_later_slots_to_the_target():
    collator = MaskCollator([SMALL_BLOCKS | {"max_temporal_keep": 0.5, "full_complement": True}])
    (context,), (target,) = collator.sample_masks(8, np.random.default_rng(0))
    assert context.max() < 4 * 196
    assert (target >= 4 * 196).sum() == 8 * 4 * 196


def test_inv_block_exchanges_context_and_target():
    context, target = MaskCollator([SMALL_BLOCKS]).sample_masks(8, np.random.default_rng(0))
    inverse = MaskCollator([SMALL_BLOCKS | {"inv_block": True}]).sample_masks(8, np.random.default_rng(0))
    torch.testing.assert_close(inverse, (target, context))


@pytest.mark.parametrize("option", ["full_complement", "pred_full_complement"])
@pytest.mark.parametrize("truncate", ["random", "first"])
def test_complements_share_out_every_token(option, truncate):
    collator = MaskCollator([LARGE_BLOCKS | {option: True}], truncate=truncate)
    (context,), (target,) = collator.sample_masks(8, np.random.default_rng(0))
    everything = torch.cat([context, target], dim=1).sort(dim=1).values
    assert (everything == torch.arange(8 * 196)).all()


@pytest.mark.parametrize(("slots", "num_blocks"), [(1.0, 12), pytest.param(0.5, 24, marks=pytest.mark.slow)])
def test_samples_without_context_are_drawn_again_as_v_jepa_does(slots, num_blocks):
    """Seven of eight draws fail; context sizes must be distributed as when each sample is drawn until it has one."""
    options = {"num_blocks": num_blocks, "spatial_scale": (0.6, 0.6), "aspect_ratio": (1.0, 1.0)}
    options |= {"temporal_scale": (slots, slots), "max_temporal_keep": slots}
    collator = MaskCollator([options], crop_size=64, num_frames=4)
    rng = np.random.default_rng(0)
    fast = [collator.sample_masks(1, rng)[0][0].shape[1] for _ in range(2000)]
    seen, _ = masks_one_at_a_time(collator.configs[0], collator.grid, 2000, numpy_draws(rng))
    slow = [len(tokens) for tokens in seen]
    assert min(fast) > 0
    share_fast, share_slow = (np.bincount(sizes, minlength=32) / 2000 for sizes in (fast, slow))
    assert np.abs(share_fast - share_slow).max() < 0.055
    assert np.mean(fast) == pytest.approx(np.mean(slow), rel=0.06)


def test_max_keep_cuts_whole_columns_at_random():
    collator = MaskCollator([SMALL_BLOCKS | {"max_keep": 83}])
    (context,), _ = collator.sample_masks(24, np.random.default_rng(0))
    columns = context.reshape(24, 8, 10) % 196
    assert (columns == columns[:, :1]).all()
    assert (columns.float().mean() - 97.5).abs() < 15, "no part of the frame is preferred"


REFUSED_OPTIONS = {
    "spatial_scale": ([0.5, 1.2], "fraction"),
    "temporal_scale": ([0.9, 0.5], "fraction"),
    "aspect_ratio": ([1.5, 0.75], "low <= high"),
    "max_temporal_keep": (0.0, "fraction"),
    "num_blocks": (0, "greater than or equal to 1"),
    "max_keep": (0, "greater than or equal to 1"),
    "truncate": ("last", "'random' or 'first'"),
    "spatial_scales": ([0.1, 0.2], "Did you mean 'spatial_scale'"),
}


@pytest.mark.parametrize("key", REFUSED_OPTIONS)
def test_options_out_of_range_are_refused(key):
    value, reason = REFUSED_OPTIONS[key]
    with pytest.raises(ConfigError, match=reason) as error:
        check({key: value}, MaskConfig, "train.yaml")
    assert key in str(error.value)


def test_options_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="exclude each other"):
        MaskConfig(full_complement=True, pred_full_complement=True)
    with pytest.raises(ValueError, match="remove max_keep"):
        MaskConfig(pred_full_complement=True, max_keep=10)


def test_masks_that_this_grid_cannot_hold_are_refused_by_entry_and_option():
    with pytest.raises(ValueError, match=r"mask\.1\.spatial_scale: .* leave no context"):
        MaskCollator([SMALL_BLOCKS, {"spatial_scale": (0.9, 1.0)}])
    with pytest.raises(ValueError, match=r"mask\.0\.spatial_scale: .* leave no context"):
        MaskCollator([SMALL_BLOCKS | {"num_blocks": 2000}])
    with pytest.raises(ValueError, match=r"mask\.0\.spatial_scale: .* leave no context"):
        MaskCollator([{"spatial_scale": (0.5, 0.97), "aspect_ratio": (0.2, 5.0)}], crop_size=(64, 256))
    with pytest.raises(ValueError, match=r"mask\.0\.spatial_scale: .* less than one patch"):
        MaskCollator([{"spatial_scale": (0.05, 0.5)}], crop_size=64)
    with pytest.raises(ValueError, match=r"mask\.0\.max_keep: 7 is less than one column"):
        MaskCollator([SMALL_BLOCKS | {"max_keep": 7}])
    MaskCollator([SMALL_BLOCKS | {"max_keep": 7}], truncate="first")
