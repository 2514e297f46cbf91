"""Multi-block masks of V-JEPA (arXiv:2404.08471, section 3.2): a union of space-time blocks is hidden.

All samples of a batch keep equally many tokens: as many as the sample with the fewest or, with a generator that all
processes share, the expectation of that number, rounded. V-JEPA truncates the index lists of the samples, which removes
nearly all tokens of the last frames; here all time slots are cut alike.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import pydantic

from tubelet.config import Config, Pair
from tubelet.grid import Grid
from tubelet.masks import CollatorOfOneKind, MaskSampler, random_order, split, tubes
from tubelet.masks.lengths import expected_minimum, round_at_random

# Expected lengths are computed from so many samples, or fewer that have so many positions together: about 0.1 s.
_SIMULATED_SAMPLES, _SIMULATED_POSITIONS, _CHUNK = 2**16, 2**24, 256
# How often samples with too few tokens for a shared length are drawn again. In batches of 24 one in ten needs it.
_MAX_REDRAWS = 10


class MaskConfig(Config):
    """Options of one multi-block mask. The block size is drawn once per batch from the ranges (low, high).

    Args:
        spatial_scale: Range of the fraction of the spatial positions that a block covers.
        temporal_scale: Range of the fraction of the time slots that a block covers.
        aspect_ratio: Range of a block's height divided by its width.
        num_blocks: Number of blocks per sample, placed independently; they may overlap.
        max_temporal_keep: Fraction of the time slots, from the first on, that may have context; the rest is target.
        max_keep: Maximum number of tokens outside the blocks that are kept; None keeps all.
        full_complement: Target is everything that is not context after the cut (V-JEPA 2).
        pred_full_complement: Context is everything that is not target after the cut (V-JEPA 2).
        inv_block: Swap context and target: the blocks are seen, the rest is predicted (V-JEPA 2).
        truncate: How samples with too many tokens are cut. "random": drop random tokens, or random columns of tokens
            where the blocks span all frames, so that masks remain tubes. "first": keep the first tokens, as in V-JEPA.
    """

    name: str = "multiblock3d"
    spatial_scale: Pair = (0.2, 0.8)
    temporal_scale: Pair = (1.0, 1.0)
    aspect_ratio: Pair = (0.3, 3.0)
    num_blocks: int = pydantic.Field(1, ge=1)
    max_temporal_keep: float = 1.0
    max_keep: int | None = pydantic.Field(None, ge=1)
    full_complement: bool = False
    pred_full_complement: bool = False
    inv_block: bool = False
    truncate: Literal["random", "first"] = "random"

    @pydantic.field_validator("spatial_scale", "temporal_scale")
    @classmethod
    def _check_scale(cls, scale: tuple[float, float]) -> tuple[float, float]:
        low, high = scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"[{low}, {high}] is no range of fractions: 0 < low <= high <= 1, as in [0.15, 0.15]")
        return scale

    @pydantic.field_validator("aspect_ratio")
    @classmethod
    def _check_aspect_ratio(cls, ratio: tuple[float, float]) -> tuple[float, float]:
        low, high = ratio
        if not 0 < low <= high < math.inf:
            raise ValueError(f"[{low}, {high}] is no range of ratios: 0 < low <= high, as in [0.75, 1.5]")
        return ratio

    @pydantic.field_validator("max_temporal_keep")
    @classmethod
    def _check_max_temporal_keep(cls, fraction: float) -> float:
        if not 0 < fraction <= 1:
            raise ValueError(f"{fraction} is no fraction of the time slots: 0 < max_temporal_keep <= 1")
        return fraction

    @pydantic.model_validator(mode="after")
    def _one_complement(self) -> "MaskConfig":
        if self.full_complement and self.pred_full_complement:
            raise ValueError("full_complement and pred_full_complement exclude each other; switch one of them off")
        if self.pred_full_complement and self.max_keep is not None:
            raise ValueError("pred_full_complement makes the context the complement of the target; remove max_keep")
        return self


class Sampler(MaskSampler):
    """Target: the union of `num_blocks` blocks. Context: the rest."""

    config: MaskConfig

    def __init__(self, config: MaskConfig, grid: Grid):
        super().__init__(config, grid)
        self._expected: dict[tuple[Grid, int], tuple[float, float]] = {}  # lengths by block size and batch size

    @property
    def draws_tubes(self) -> bool:
        c = self.config
        return self._are_tubes(_block_size(self.grid, c.temporal_scale[0], c.spatial_scale[0], c.aspect_ratio[0]))

    def check(self) -> None:
        config, grid = self.config, self.grid
        if int(grid.tokens_per_frame * config.spatial_scale[0]) < 1:
            raise ValueError(
                f"spatial_scale: {config.spatial_scale[0]} of {grid.h}x{grid.w} patches is less than one patch; "
                f"the least here is {1 / grid.tokens_per_frame:.2g}"
            )
        longest = _block_size(grid, config.temporal_scale[1], config.spatial_scale[1], config.aspect_ratio[1])
        if config.max_keep is not None and config.max_keep < grid.t and self._are_tubes(longest):
            raise ValueError(
                f"max_keep: {config.max_keep} is less than one column of {grid.t} tokens; the least is {grid.t}"
            )
        fraction = self._least_fraction_with_context()
        if fraction < 0.01:
            raise ValueError(
                f"spatial_scale: {config.num_blocks} block(s) of scale {config.spatial_scale[1]} leave no context in "
                f"{1 - fraction:.1%} of the draws; lower spatial_scale or num_blocks"
            )

    def _least_fraction_with_context(self) -> float:
        """Fraction of samples with a context when the largest block is drawn, at the worst aspect ratio."""
        config, rng = self.config, np.random.default_rng(0)
        low, high = config.aspect_ratio
        # The widest block, the tallest, and the one with about the aspect ratio of the grid.
        like_the_grid = min(max(low, (self.grid.h - 0.5) / (self.grid.w - 0.5)), high)
        blocks = [
            _block_size(self.grid, config.temporal_scale[1], config.spatial_scale[1], aspect_ratio)
            for aspect_ratio in (low, like_the_grid, high)
        ]
        return min(1 - self._place_blocks(block, 500, rng).all(axis=1).mean() for block in blocks)

    def sample(
        self, batch_size: int, rng: np.random.Generator, shared: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        ranges = config.temporal_scale, config.spatial_scale, config.aspect_ratio
        sizes = rng if shared is None else shared
        block = _block_size(self.grid, *(sizes.uniform(low, high) for low, high in ranges))
        hidden = self._draw_hidden(block, batch_size, rng)
        if shared is None:
            num_context, num_target = map(int, self._lengths(block, self._count(block, hidden), np.min))
        else:
            num_context, num_target = self._shared_lengths(block, batch_size, shared)
            for _ in range(_MAX_REDRAWS):
                short = self._lacks_tokens(block, self._count(block, hidden), num_context, num_target)
                if not short.any():
                    break
                hidden[short] = self._draw_hidden(block, short.sum(), rng)
        if config.truncate == "first":
            order = np.arange(self._num_positions(block))
            hidden = np.tile(hidden, self._num_positions(block) // hidden.shape[1])
        else:
            order = random_order(hidden.shape, rng)
        context, target = split(hidden, order, num_context, num_target)
        if self._are_tubes(block):
            context, target = tubes(context, self.grid), tubes(target, self.grid)
        return (target, context) if config.inv_block else (context, target)

    def _lengths(
        self, block: Grid, num_hidden: np.ndarray, least: Callable[[np.ndarray], float]
    ) -> tuple[float, float]:
        """Return the numbers of context and target positions to which samples are cut.

        Args:
            block: Size of the blocks.
            num_hidden: Number of hidden positions of each sample.
            least: Returns the number to which samples are cut that have these numbers.
        """
        config, positions = self.config, self._num_positions(block)
        num_context = least(np.minimum(positions - num_hidden, self._max_context(block)))
        num_target = least(num_hidden)
        if config.full_complement:
            num_target = positions - num_context
        elif config.pred_full_complement:
            num_context = positions - num_target
        return num_context, num_target

    def _shared_lengths(self, block: Grid, batch_size: int, shared: np.random.Generator) -> tuple[int, int]:
        """Return the mean, over batches with such blocks, of the numbers to which they are cut, rounded at random."""
        key = block, batch_size
        if key not in self._expected:
            rng, drawn = np.random.default_rng(tuple(block)), self.grid.tokens_per_frame
            if not self._span_all_slots(block):
                drawn *= self.grid.t
            num_samples = max(min(_SIMULATED_SAMPLES, _SIMULATED_POSITIONS // drawn), 4 * batch_size)
            chunks = (self._draw_hidden(block, _CHUNK, rng) for _ in range(0, num_samples, _CHUNK))
            num_hidden = np.concatenate([self._count(block, hidden) for hidden in chunks])
            self._expected[key] = self._lengths(block, num_hidden, partial(expected_minimum, batch_size=batch_size))
        context, target = self._expected[key]
        positions, chance = self._num_positions(block), shared.random()
        step = max(1, round(positions / 100))
        # What is rounded is the length of the encoder's sequence and that of the predictor's.
        num_context = round_at_random(context, step, 1, min(positions - 1, self._max_context(block)), chance)
        return num_context, round_at_random(context + target, step, num_context + 1, positions, chance) - num_context

    def _lacks_tokens(self, block: Grid, num_hidden: np.ndarray, num_context: int, num_target: int) -> np.ndarray:
        """Return which samples have fewer tokens than they should keep, bool [B]; complements fit by themselves."""
        lacks_context = self._num_positions(block) - num_hidden < num_context
        lacks_target = num_hidden < num_target
        if self.config.full_complement:
            return lacks_context
        return lacks_target if self.config.pred_full_complement else lacks_context | lacks_target

    def _count(self, block: Grid, hidden: np.ndarray) -> np.ndarray:
        """Return the number of hidden positions of each sample: hidden columns may count for all of their tokens."""
        return hidden.sum(axis=1) * (self._num_positions(block) // hidden.shape[1])

    def _draw_hidden(self, block: Grid, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """Place the blocks such that every sample has a context; shapes as in `_place_blocks`."""
        hidden = self._place_blocks(block, batch_size, rng)
        while (without_context := hidden.all(axis=1)).any():
            hidden[without_context] = self._place_blocks(block, without_context.sum(), rng)
        return hidden

    def _place_blocks(self, block: Grid, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """Place the blocks; return bool [batch_size, N], True where hidden.

        N counts columns of tokens if the blocks span all slots, tokens otherwise.
        """
        config, grid = self.config, self.grid
        num_origins = np.array(grid) - block + 1
        first = (rng.random((batch_size, config.num_blocks, 3)) * num_origins).astype(np.uint16)
        # Which rows and columns each block spans, [B, n, h] and [B, n, w]; or which rows of which slots, [B, n, t*h].
        rows = _spans(first[:, :, 1], block.h, grid.h)
        columns = _spans(first[:, :, 2], block.w, grid.w)
        if not self._span_all_slots(block):
            slots = _spans(first[:, :, 0], block.t, grid.t)
            rows = (slots[..., :, None] & rows[..., None, :]).reshape(batch_size, config.num_blocks, -1)
        # A product of matrices adds up, for every position, the blocks that hide it.
        count = rows.swapaxes(1, 2).astype(np.float32) @ columns.astype(np.float32)
        hidden = (count > 0).reshape(batch_size, -1)
        if not self._span_all_slots(block):
            hidden[:, self._context_slots() * grid.tokens_per_frame :] = True
        return hidden

    def _span_all_slots(self, block: Grid) -> bool:
        return block.t == self._context_slots() == self.grid.t

    def _are_tubes(self, block: Grid) -> bool:
        """Whether complete columns of tokens are hidden and kept; positions are then columns, otherwise tokens."""
        return self.config.truncate == "random" and self._span_all_slots(block)

    def _num_positions(self, block: Grid) -> int:
        return self.grid.tokens_per_frame * (1 if self._are_tubes(block) else self.grid.t)

    def _max_context(self, block: Grid) -> int:
        """Number of positions outside of the blocks that `max_keep` allows."""
        positions, max_keep = self._num_positions(block), self.config.max_keep
        return positions if max_keep is None else max_keep // (self.grid.t if self._are_tubes(block) else 1)

    def _context_slots(self) -> int:
        return max(1, int(self.grid.t * self.config.max_temporal_keep))


class MaskCollator(CollatorOfOneKind):
    """Draws multi-block masks; the arguments are V-JEPA's.

    Example:
        >>> masks = MaskCollator([{"num_blocks": 8, "spatial_scale": (0.15, 0.15), "aspect_ratio": (0.75, 1.5)}])
        >>> context, target = masks.sample_masks(24, np.random.default_rng(0))  # lists of one int64 [24, K] each
    """

    config_type = MaskConfig
    sampler_type = Sampler


def _block_size(grid: Grid, temporal_scale: float, spatial_scale: float, aspect_ratio: float) -> Grid:
    """Return the size of a block in tokens: at least one token, at most the grid."""
    area = int(grid.tokens_per_frame * spatial_scale)
    return Grid(
        t=max(1, int(grid.t * temporal_scale)),
        h=min(max(1, round(math.sqrt(area * aspect_ratio))), grid.h),
        w=min(max(1, round(math.sqrt(area / aspect_ratio))), grid.w),
    )


def _spans(first: np.ndarray, length: int, size: int) -> np.ndarray:
    """Return bool [..., size], True for the `length` positions from `first` [...] on."""
    # Unsigned: positions before the first wrap around to large numbers, so one comparison checks both ends.
    return np.arange(size, dtype=np.uint16) - first[..., None] < length
