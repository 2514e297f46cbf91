"""Masks: which tokens the encoder sees (context) and which the predictor has to fill in (target).

Each file here is a mask type. It holds `MaskConfig`, the options of one entry of the YAML list `mask:`, and
`MaskCollator`, which draws one pair of index tensors for each entry. What they share stands in this file.

Tokens are numbered time-major: index = (slot * h + y) * w + x on a grid of (t, h, w) tokens.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate, get_worker_info

from tubelet.config import Config


class Grid(NamedTuple):
    """Numbers of tokens along time, height and width."""

    t: int
    h: int
    w: int

    @property
    def columns(self) -> int:
        """Spatial positions; each is a column of `t` tokens."""
        return self.h * self.w


def token_grid(
    crop_size: int | tuple[int, int], num_frames: int, patch_size: int | tuple[int, int], tubelet_size: int
) -> Grid:
    """The token grid of a clip; an image (num_frames 1) has one time slot.

    Raises ValueError when patches do not tile the crop, or tubelets do not tile the frames.
    """
    height, width = _pair(crop_size)
    patch_height, patch_width = _pair(patch_size)
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"crop_size {height}x{width} is no multiple of patch_size {patch_height}x{patch_width}; "
            f"the nearest that is: {_nearest_multiple(height, patch_height)}x{_nearest_multiple(width, patch_width)}"
        )
    if num_frames > 1 and num_frames % tubelet_size:
        raise ValueError(
            f"num_frames {num_frames} is no multiple of tubelet_size {tubelet_size}; "
            f"the nearest that is: {_nearest_multiple(num_frames, tubelet_size)}"
        )
    slots = num_frames // tubelet_size if num_frames > 1 else 1
    return Grid(slots, height // patch_height, width // patch_width)


def split(hidden: np.ndarray, order: np.ndarray, num_context: int, num_target: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `num_context` seen and the `num_target` hidden ones that come first in `order`.

    Where more are wanted than there are, the other side's last ones fill up: what one side gives up goes to the other.

    Args:
        hidden: bool [B, N].
        order: whole numbers [B, N] or [N] from 0 to 2^32 - 1; equal ones count in the order of their positions.

    Returns:
        int64 [B, num_context] and [B, num_target], each row sorted.
    """
    num_positions = hidden.shape[1]
    bits = num_positions.bit_length()
    # From the first seen to the last seen, then from the last hidden to the first hidden. Numbers that carry their
    # position in the low bits can be sorted as they are, which is much faster than an argsort.
    order = order.astype(np.int64)
    line = (np.where(hidden, 2**33 - order, order) << bits) | np.arange(num_positions)
    line.sort(axis=1)
    line &= (1 << bits) - 1
    return np.sort(line[:, :num_context], axis=1), np.sort(line[:, num_positions - num_target :], axis=1)


def random_order(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """An `order` for `split` that prefers no position."""
    return rng.integers(2**32, size=shape, dtype=np.uint32)


def tubes(columns: np.ndarray, grid: Grid) -> np.ndarray:
    """Spatial positions [B, K], sorted, repeated in every time slot: token numbers [B, t*K], sorted."""
    slots = np.arange(grid.t)[:, None] * grid.columns
    return (slots + columns[:, None, :]).reshape(len(columns), -1)


class BaseMaskCollator(abc.ABC):
    """Draws, for each entry of `cfgs_mask`, context and target token numbers for every sample of a batch.

    Args:
        cfgs_mask: one `MaskConfig`, or mapping of its options, for each mask.
        crop_size: pixels, one number or (height, width).
        num_frames: frames of a clip.
        patch_size: pixels, one number or (height, width).
        tubelet_size: frames of a token.
        truncate: sets the option of that name in every entry of `cfgs_mask`; None leaves the entries as they are.
        seed: of the masks drawn by `__call__`.

    Raises ValueError, naming entry, option and remedy, where masks of that kind cannot be drawn.
    """

    config_type: ClassVar[type[Config]]

    def __init__(
        self,
        cfgs_mask: Sequence[Config | Mapping[str, Any]],
        crop_size: int | tuple[int, int] = 224,
        num_frames: int = 16,
        patch_size: int | tuple[int, int] = 16,
        tubelet_size: int = 2,
        truncate: str | None = None,
        seed: int = 0,
    ):
        if not cfgs_mask:
            raise ValueError("mask: the list is empty; give at least one entry")
        self.grid = token_grid(crop_size, num_frames, patch_size, tubelet_size)
        override = {} if truncate is None else {"truncate": truncate}
        self.configs = [self.config_type.model_validate({**_mapping(entry), **override}) for entry in cfgs_mask]
        for i, config in enumerate(self.configs):
            try:
                self._check(config)
            except ValueError as error:
                raise ValueError(f"mask.{i}.{error}") from None
        self.seed = seed
        self._calls = 0

    def sample_masks(self, batch_size: int, rng: np.random.Generator) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Context and target token numbers, for each entry one int64 [batch_size, K] of either; drawn from `rng` only.

        Rows are sorted, without repetition, and a sample's context and target are disjoint.
        """
        pairs = [self._sample(config, batch_size, rng) for config in self.configs]
        contexts, targets = zip(*pairs, strict=True)
        return [torch.from_numpy(context) for context in contexts], [torch.from_numpy(target) for target in targets]

    def __call__(self, batch: list) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
        """A list of samples to (collated samples, context masks, target masks); a `collate_fn` of torch's DataLoader.

        The masks are a function of `seed`, the number of calls so far, and, in a worker of a DataLoader, the worker's
        seed: workers are copies of one collator, and every epoch starts new ones.
        """
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, worker.seed if worker else 0, self._calls))
        self._calls += 1
        return default_collate(batch), *self.sample_masks(len(batch), rng)

    @property
    def draws_tubes(self) -> bool:
        """Whether every mask keeps the same places in all time slots; encoders fold space-time attention then."""
        return all(self._draws_tubes(config) for config in self.configs)

    @abc.abstractmethod
    def _draws_tubes(self, config: Config) -> bool: ...

    @abc.abstractmethod
    def _check(self, config: Config) -> None:
        """Raises ValueError("<option>: <reason and remedy>") where `config` cannot work on this grid."""

    @abc.abstractmethod
    def _sample(self, config: Config, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Context and target token numbers for one mask, int64 [batch_size, K]."""


def _mapping(entry: Config | Mapping[str, Any]) -> Mapping[str, Any]:
    return entry.model_dump() if isinstance(entry, Config) else entry


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _nearest_multiple(number: int, divisor: int) -> int:
    return max(1, round(number / divisor)) * divisor
