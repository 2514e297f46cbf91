"""What holds for every mask type; a new file in tubelet/masks is met here the moment it is added."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tubelet.config import registry
from tubelet.grid import ClipShape
from tubelet.masks import MASKS, build_collator
from tubelet.masks.random_tube import MaskCollator as RandomTube

MASK_TYPES = MASKS.available()


@pytest.fixture(params=MASK_TYPES)
def module(request):
    return registry.find("masks", request.param)


def collator_of(module, entries=2, **arguments):
    clip = ClipShape(
        arguments.pop("num_frames", 16),
        arguments.pop("crop_size", 224),
        arguments.pop("patch_size", 16),
        arguments.pop("tubelet_size", 2),
    )
    return build_collator([module.MaskConfig()] * entries, clip, **arguments)


@pytest.mark.parametrize(
    ("crop_size", "num_frames", "patch_size", "tubelet_size", "grid"),
    [
        (224, 16, 16, 2, (8, 14, 14)),
        ((96, 160), 8, 16, 2, (4, 6, 10)),
        (64, 16, (16, 8), 4, (4, 4, 8)),
        (224, 1, 16, 2, (1, 14, 14)),
    ],
)
def test_masks_are_sorted_disjoint_and_on_the_grid(module, crop_size, num_frames, patch_size, tubelet_size, grid):
    collator = collator_of(
        module, crop_size=crop_size, num_frames=num_frames, patch_size=patch_size, tubelet_size=tubelet_size
    )
    assert collator.grid == grid
    for batch_size in (1, 7):
        contexts, targets = collator.sample_masks(batch_size, np.random.default_rng(batch_size))
        assert len(contexts) == len(targets) == 2
        for context, target in zip(contexts, targets, strict=True):
            for tokens in (context, target):
                assert tokens.dtype == torch.int64
                assert tokens.shape[0] == batch_size
                assert tokens.shape[1] > 0
                assert (tokens.diff(dim=1) > 0).all(), "sorted, none twice"
                assert tokens.min() >= 0
                assert tokens.max() < np.prod(grid)
            assert not (context[:, :, None] == target[:, None, :]).any()


@pytest.mark.parametrize(
    "options", [{}, {"temporal_scale": (0.5, 1.0)}, {"max_temporal_keep": 0.5}, {"truncate": "first"}]
)
def test_masks_said_to_be_tubes_are_tubes(module, options):
    if not options.keys() <= module.MaskConfig.model_fields.keys():
        pytest.skip("this mask type has no such option")
    collator = build_collator([module.MaskConfig(), module.MaskConfig(**options)], ClipShape(16, 224))
    assert not (options and collator.draws_tubes)
    for seed in range(5 * collator.draws_tubes):
        for masks in collator.sample_masks(4, np.random.default_rng(seed)):
            for tokens in masks:
                slots = torch.zeros(4, *collator.grid).flatten(1).scatter(1, tokens, 1.0).view(4, collator.grid.t, -1)
                assert (slots == slots[:, :1]).all()


def test_masks_are_a_function_of_the_generator(module):
    collator, twin = collator_of(module), collator_of(module)
    first = collator.sample_masks(4, np.random.default_rng((0, 5)))
    collator.sample_masks(4, np.random.default_rng((0, 6)))
    torch.testing.assert_close(first, collator.sample_masks(4, np.random.default_rng((0, 5))), rtol=0, atol=0)
    torch.testing.assert_close(first, twin.sample_masks(4, np.random.default_rng((0, 5))), rtol=0, atol=0)
    other = twin.sample_masks(4, np.random.default_rng((0, 6)))
    assert not same_masks(first, other)


def test_entries_and_samples_differ(module):
    contexts, _ = collator_of(module).sample_masks(3, np.random.default_rng(0))
    assert not torch.equal(contexts[0][0], contexts[0][1])
    assert not torch.equal(contexts[0], contexts[1])


def test_calls_differ_and_can_be_repeated(module):
    batch = [(torch.full((3, 4), i), i) for i in range(5)]
    one, two = collator_of(module, seed=1), collator_of(module, seed=1)
    (clips, labels), *masks = one(batch)
    assert clips.shape == (5, 3, 4)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert masks[0][0].shape[0] == 5
    _, *again = two(batch)
    assert same_masks(masks, again)
    assert not same_masks(masks, one(batch)[1:])
    assert not same_masks(masks, collator_of(module, seed=2)(batch)[1:])


def test_workers_and_epochs_differ_and_can_be_repeated(module):
    loader = DataLoader(torch.arange(8), batch_size=2, num_workers=2, collate_fn=collator_of(module, entries=1))

    def two_epochs():
        torch.manual_seed(0)
        return [masks for _ in range(2) for _, *masks in loader]

    masks = two_epochs()
    assert len(masks) == 8
    assert not any(same_masks(masks[i], masks[j]) for i in range(8) for j in range(i))
    assert all(same_masks(a, b) for a, b in zip(masks, two_epochs(), strict=True))


def test_collators_travel_to_spawned_workers(module):
    collator = collator_of(module)
    twin = pickle.loads(pickle.dumps(collator))
    assert same_masks(
        collator.sample_masks(2, np.random.default_rng(0)), twin.sample_masks(2, np.random.default_rng(0))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop_size": 225}, "crop_size 225 is not divisible by patch_size 16; .* 224"),
        ({"crop_size": (224, 100)}, "crop_size 224x100 is not divisible by patch_size 16; .* 224x96"),
        ({"num_frames": 15}, "num_frames 15 is not divisible by tubelet_size 2; .* 16"),
        ({"tubelet_size": 32}, "num_frames 16 is not divisible by tubelet_size 32; .* 32"),
        ({"entries": 0}, "the list is empty"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        collator_of(module, **arguments)


def test_unknown_options_are_refused(module):
    with pytest.raises(ValueError, match="unknown_option"):
        build_collator([{"name": module.MaskConfig().name, "unknown_option": 1}], ClipShape(16, 224))


def test_v_jepas_constructor_draws_the_same(module):
    if not hasattr(module, "MaskCollator"):
        pytest.skip("has no constructor with V-JEPA's arguments")
    sizes = {"crop_size": (96, 160), "num_frames": 8, "patch_size": 16, "tubelet_size": 2}
    theirs = module.MaskCollator([{}, {}], **sizes, seed=3)
    ours = build_collator([module.MaskConfig().name] * 2, ClipShape(8, (96, 160)), seed=3)
    assert same_masks(theirs.sample_masks(5, np.random.default_rng(1)), ours.sample_masks(5, np.random.default_rng(1)))
    batch = [torch.zeros(1)] * 3
    assert same_masks(theirs(batch)[1:], ours(batch)[1:])


def test_masks_of_different_kinds_in_one_list():
    """Each draws from the generator where the one before has stopped."""
    entries = [{"num_blocks": 2}, {"name": "random_tube", "ratio": 0.75}, {"name": "multiblock3d", "num_blocks": 1}]
    mixed = build_collator(entries, ClipShape(16, 224))
    assert (len(mixed), mixed.grid, mixed.draws_tubes) == (3, (8, 14, 14), True)
    found = mixed.sample_masks(4, np.random.default_rng(0))
    rng = np.random.default_rng(0)
    single = [build_collator([entry], ClipShape(16, 224)).sample_masks(4, rng) for entry in entries]
    expected = [[masks[side][0] for masks in single] for side in (0, 1)]
    assert same_masks(found, expected)
    assert found[0][1].shape[1] == 8 * 49
    with pytest.raises(ValueError, match=r"mask\.1\.ratio: .* leaves 0 of them as context"):
        build_collator([{}, {"name": "random_tube", "ratio": 0.99}], ClipShape(16, 64))
    slots = [{}, {"temporal_scale": [0.5, 0.5]}, {"name": "random_tube"}]
    assert not build_collator(slots, ClipShape(16, 224)).draws_tubes


def test_random_tube_hides_its_ratio_in_whole_columns():
    for ratio, kept in ((0.9, 19), (0.75, 49), (0.5, 98)):  # of 196, rounded down as in V-JEPA
        (context,), (target,) = RandomTube([{"ratio": ratio}]).sample_masks(24, np.random.default_rng(0))
        assert context.shape == (24, 8 * kept)
        assert target.shape == (24, 8 * (196 - kept))
        columns = context.reshape(24, 8, kept) % 196
        assert (columns == columns[:, :1]).all()


def test_random_tube_positions_are_uniform():
    (context,), _ = RandomTube([{"ratio": 0.75}], crop_size=64).sample_masks(8000, np.random.default_rng(0))
    times = np.bincount(context[:, :4].flatten().numpy(), minlength=16)
    assert len(times) == 16
    assert (np.abs(times - 2000) < 5 * np.sqrt(2000 * 0.75)).all()


def test_random_tube_ratio_counts_exactly():
    (context,), _ = RandomTube([{"ratio": 0.9}], crop_size=(32, 80)).sample_masks(1, np.random.default_rng(0))
    assert context.shape == (1, 8), "a tenth of ten positions is one, although 10 * (1 - 0.9) < 1 in floats"


@pytest.mark.parametrize("ratio", [0.0, 1.0, 0.97])
def test_random_tube_refuses_ratios_that_leave_nothing(ratio):
    with pytest.raises(ValueError, match="ratio"):
        RandomTube([{"ratio": ratio}], crop_size=64)


def same_masks(masks, others) -> bool:
    return all(
        mask.shape == other.shape and torch.equal(mask, other)
        for side, other_side in zip(masks, others, strict=True)
        for mask, other in zip(side, other_side, strict=True)
    )
