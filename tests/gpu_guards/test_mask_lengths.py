"""All processes have sequences of the same lengths, and a run has few different ones, in every recipe.

Each new length may cost a plan of the attention kernel, and processes with more tokens keep the others waiting.
"""

import functools

import pytest

from tests.gpu_guards.recipes import RECIPES, load_recipe
from tubelet.data.mask_draws import draw_masks
from tubelet.masks import build_collator

STEPS, MOST = 300, 32


class Draws:
    """The masks of a recipe, seen as the number of context and of target tokens of each mask."""

    def __init__(self, data, mask, seed):
        self.data, self.seed, self.collator = data, seed, build_collator(mask, data.clip_shape)

    def shapes(self, step, group=0, processes=1, lengths="shared"):
        together = self.data.mask_batch_size or self.data.batch_size * processes
        pairs = draw_masks(self.collator, together, seed=self.seed, step=step, group=group, lengths=lengths)
        return [(context.shape[1], target.shape[1]) for context, target in zip(*pairs, strict=True)]

    @functools.cached_property
    def distinct(self):
        """Lengths of the sequences of encoder and predictor."""
        return lengths_of(self.shapes(step) for step in range(STEPS))


def lengths_of(shapes):
    tokens = {pair for step in shapes for pair in step}
    return {("encoder", context) for context, _ in tokens} | {("predictor", sum(pair)) for pair in tokens}


@functools.cache
def draws(name):
    """One object for all recipes whose masks are the same."""
    options = load_recipe(name)
    if not options.mask:
        pytest.skip("has no masks")
    assert options.data.mask_lengths == "shared"
    data = options.data.model_copy(update={"datasets": [], "datasets_weights": None})
    key = str((options.mask, data.clip_shape, data.batch_size, data.mask_batch_size))
    return _DRAWS.setdefault(key, Draws(data, options.mask, options.meta.seed))


_DRAWS: dict[str, Draws] = {}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_has_few_lengths(name):
    assert len(draws(name).distinct) <= MOST


@pytest.mark.parametrize("name", RECIPES)
def test_every_process_has_the_same_lengths(name):
    """In global batches whose masks are not drawn at once; there are then no processes with other lengths."""
    if draws(name).data.mask_batch_size is None:
        pytest.skip("masks are drawn for the global batch")
    for step in range(20):
        first = draws(name).shapes(step)
        assert all(draws(name).shapes(step, group) == first for group in (1, 7, 127))


def test_without_shared_lengths_both_fail():
    steps = [draws("vjepa_vitl16").shapes(step, lengths="shortest") for step in range(STEPS)]
    assert len(lengths_of(steps)) > 2 * MOST
    others = [draws("vjepa_vitl16").shapes(step, group=1, lengths="shortest") for step in range(20)]
    assert sum(one != other for one, other in zip(steps, others, strict=False)) > 15
