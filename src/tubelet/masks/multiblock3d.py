"""Multi-block masks of V-JEPA (arXiv:2404.08471, section 3.2): a union of space-time blocks is hidden.

All samples of a batch keep as many tokens as the sample with the fewest. V-JEPA truncates the index lists of the
others, which removes nearly all tokens of the last frames; here all time slots are cut alike.
"""

import math
from typing import Literal

import numpy as np
import pydantic

from tubelet.config import Config, Pair
from tubelet.grid import Grid
from tubelet.masks import CollatorOfOneKind, MaskSampler, random_order, split, tubes


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
        return min(1 - self._draw_hidden(block, 500, rng).all(axis=1).mean() for block in blocks)

    def sample(self, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        config = self.config
        ranges = config.temporal_scale, config.spatial_scale, config.aspect_ratio
        block = _block_size(self.grid, *(rng.uniform(low, high) for low, high in ranges))
        hidden = self._draw_hidden(block, batch_size, rng)
        while (without_context := hidden.all(axis=1)).any():
            hidden[without_context] = self._draw_hidden(block, without_context.sum(), rng)
        are_tubes = self._are_tubes(block)
        context, target = _cut(config, hidden, self.grid.t if are_tubes else 1, rng)
        if are_tubes:
            context, target = tubes(context, self.grid), tubes(target, self.grid)
        return (target, context) if config.inv_block else (context, target)

    def _draw_hidden(self, block: Grid, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """Place the blocks; return bool [batch_size, N], True where hidden. N counts columns for tubes, else tokens."""
        config, grid = self.config, self.grid
        num_origins = np.array(grid) - block + 1
        first = (rng.random((batch_size, config.num_blocks, 3)) * num_origins).astype(np.uint16)
        # Which rows and columns each block spans, [B, n, h] and [B, n, w]; or which rows of which slots, [B, n, t*h].
        rows = _spans(first[:, :, 1], block.h, grid.h)
        columns = _spans(first[:, :, 2], block.w, grid.w)
        tubes_only = self._are_tubes(block)
        if not tubes_only:
            slots = _spans(first[:, :, 0], block.t, grid.t)
            rows = (slots[..., :, None] & rows[..., None, :]).reshape(batch_size, config.num_blocks, -1)
        # A product of matrices adds up, for every position, the blocks that hide it.
        count = rows.swapaxes(1, 2).astype(np.float32) @ columns.astype(np.float32)
        hidden = (count > 0).reshape(batch_size, -1)
        if not tubes_only:
            hidden[:, self._context_slots() * grid.tokens_per_frame :] = True
        return hidden

    def _are_tubes(self, block: Grid) -> bool:
        """Whether complete columns of tokens are hidden and kept."""
        return self.config.truncate == "random" and block.t == self._context_slots() == self.grid.t

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


def _cut(
    config: MaskConfig, hidden: np.ndarray, tokens_per_position: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return the seen and the hidden positions, [B, K] each, sorted; K is that of the sample with the fewest."""
    num_positions = hidden.shape[1]
    num_hidden = hidden.sum(axis=1)
    num_context, num_target = num_positions - num_hidden.max(), num_hidden.min()
    if config.max_keep is not None:
        num_context = min(num_context, config.max_keep // tokens_per_position)
    if config.full_complement:
        num_target = num_positions - num_context
    elif config.pred_full_complement:
        num_context = num_positions - num_target
    order = np.arange(num_positions) if config.truncate == "first" else random_order(hidden.shape, rng)
    return split(hidden, order, num_context, num_target)
