"""Masks: which tokens the encoder sees (context) and which the predictor has to fill in (target).

Each file here is a mask. It holds `MaskConfig`, the options of an entry of the YAML list `mask:`, and `Sampler`, which
draws one pair of index tensors for each batch. A `MaskCollator` draws from a list of samplers of any kinds.

Tokens are numbered in time-major order: index = (slot * h + y) * w + x on a grid of (t, h, w) tokens.
"""

import abc
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from torch.utils.data import default_collate, get_worker_info

from tubelet.config import Config
from tubelet.config.registry import Module, PartOptions, find
from tubelet.grid import ClipShape, Grid

MASKS = Module("masks", "MaskConfig", default="multiblock3d")
MaskOptions = Annotated[PartOptions, MASKS]
"""Type of an option that selects a mask: `{name: multiblock3d, **its options}`."""


def split(hidden: np.ndarray, order: np.ndarray, num_context: int, num_target: int) -> tuple[np.ndarray, np.ndarray]:
    """Select the `num_context` seen and the `num_target` hidden positions that come first in `order`.

    If `num_context` exceeds the number of seen positions, the last hidden ones become context, and vice versa.

    Args:
        hidden: Bool [B, N].
        order: Integers [B, N] or [N] from 0 to 2^32 - 1; ties are broken by position.
        num_context: Number of context positions.
        num_target: Number of target positions.

    Returns:
        Context and target positions, int64 [B, num_context] and [B, num_target], each row sorted.
    """
    num_positions = hidden.shape[1]
    bits = num_positions.bit_length()
    # Sorted from the first to the last seen position, then from the last to the first hidden one. The keys have the
    # position in their low bits, so that they can be sorted themselves, which is much faster than an argsort.
    order = order.astype(np.int64)
    keys = (np.where(hidden, 2**33 - order, order) << bits) | np.arange(num_positions)
    keys.sort(axis=1)
    keys &= (1 << bits) - 1
    return np.sort(keys[:, :num_context], axis=1), np.sort(keys[:, num_positions - num_target :], axis=1)


def random_order(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return a uniformly random `order` for `split`."""
    return rng.integers(2**32, size=shape, dtype=np.uint32)


def tubes(columns: np.ndarray, grid: Grid) -> np.ndarray:
    """Repeat sorted spatial positions [B, K] in every time slot; return sorted token indices [B, t*K]."""
    slots = np.arange(grid.t)[:, None] * grid.tokens_per_frame
    return (slots + columns[:, None, :]).reshape(len(columns), -1)


class MaskSampler(abc.ABC):
    """Draws one mask for each sample of a batch.

    Args:
        config: Options of the mask.
        grid: Token grid of the clips.

    Raises:
        ValueError: Such masks cannot be drawn on this grid. The message is "<option>: <reason and remedy>".
    """

    def __init__(self, config: Any, grid: Grid):
        self.config, self.grid = config, grid
        self.check()

    @property
    @abc.abstractmethod
    def draws_tubes(self) -> bool:
        """Whether all time slots keep the same positions; encoders can then fold their attention."""

    @abc.abstractmethod
    def check(self) -> None:
        """Raise ValueError where masks of these options cannot be drawn on the grid."""

    @abc.abstractmethod
    def sample(
        self, batch_size: int, rng: np.random.Generator, shared: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return context and target token indices, int64 [batch_size, K] each.

        Rows are sorted, without repetition, and context and target of a sample are disjoint. Both K depend on
        `batch_size` and `shared` alone, unless that is None; see `MaskCollator.sample_masks`.
        """


class MaskCollator:
    """Draws context and target tokens of every sample of a batch, for each of several masks.

    Args:
        samplers: One for each mask.
        seed: Seed of the masks drawn by `__call__`.
    """

    def __init__(self, samplers: Sequence[MaskSampler], seed: int = 0):
        self.samplers = list(samplers)
        self.seed = seed
        self._calls = 0

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.samplers)

    @property
    def grid(self) -> Grid:
        return self.samplers[0].grid

    @property
    def configs(self) -> list[Any]:
        """Options of each mask."""
        return [sampler.config for sampler in self.samplers]

    @property
    def draws_tubes(self) -> bool:
        """Whether every mask keeps the same positions in all time slots; encoders can then fold their attention."""
        return all(sampler.draws_tubes for sampler in self.samplers)

    def sample_masks(
        self, batch_size: int, rng: np.random.Generator, shared: np.random.Generator | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Draw masks.

        Args:
            batch_size: Number of samples.
            rng: Generator of what differs between samples.
            shared: Generator of what batches have in common: how large blocks are and how many tokens are kept, which
                is then one of few numbers. Generators in the same state give batches of the same shapes, in all
                processes of a run. None: everything comes from `rng`, and every sample keeps as many tokens as the one
                with the fewest in this batch.

        Returns:
            Context and target token indices: for each mask one int64 [batch_size, K] of either. Rows are sorted,
            without repetition, and context and target of a sample are disjoint.
        """
        pairs = [sampler.sample(batch_size, rng, shared) for sampler in self.samplers]
        return [torch.from_numpy(context) for context, _ in pairs], [torch.from_numpy(target) for _, target in pairs]

    def __call__(self, batch: list) -> tuple[Any, list[torch.Tensor], list[torch.Tensor]]:
        """Turn a list of samples into (collated samples, context masks, target masks); a `collate_fn` of a DataLoader.

        The masks are a function of `seed`, the number of calls so far and, in a worker of a DataLoader, the worker's
        seed: workers are copies of one collator, and every epoch starts new ones.
        """
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, worker.seed if worker else 0, self._calls))
        self._calls += 1
        return default_collate(batch), *self.sample_masks(len(batch), rng)


def build_collator(mask: Sequence[Config | Mapping[str, Any]], clip: ClipShape, seed: int = 0) -> MaskCollator:
    """Build the collator of a list of masks, which may be of different kinds.

    Args:
        mask: Options of each mask: values of type `MaskOptions`, as checked or as in YAML.
        clip: Size of the clips and tubelets.
        seed: Seed of the masks that the collator draws as a `collate_fn`.

    Raises:
        ValueError: The list is empty, or a mask cannot be drawn. The message has the entry, the option and the remedy.

    Example:
        >>> masks = build_collator([{"name": "random_tube", "ratio": 0.9}], ClipShape(16, 224))
        >>> context, target = masks.sample_masks(24, np.random.default_rng(0))  # lists of one int64 [24, K] each
    """
    configs = [MASKS.parse(entry) for entry in mask]
    return MaskCollator(_samplers([(find("masks", config.name).Sampler, config) for config in configs], clip), seed)


class CollatorOfOneKind(MaskCollator):
    """Base of each file's `MaskCollator`, with the arguments of V-JEPA's.

    Args:
        cfgs_mask: Options of each mask, as `MaskConfig` or as a mapping.
        crop_size: Pixels, one number or (height, width).
        num_frames: Frames of a clip.
        patch_size: Pixels, one number or (height, width).
        tubelet_size: Frames of a token.
        truncate: Sets the option of that name in every entry of `cfgs_mask`; None leaves the entries as they are.
        seed: Seed of the masks drawn by `__call__`.

    Raises:
        ValueError: Such masks cannot be drawn. The message has the entry, the option and the remedy.
    """

    config_type: ClassVar[type[Config]]
    sampler_type: ClassVar[type[MaskSampler]]

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
        override = {} if truncate is None else {"truncate": truncate}
        entries = [entry.model_dump() if isinstance(entry, Config) else entry for entry in cfgs_mask]
        configs = [self.config_type.model_validate({**entry, **override}) for entry in entries]
        clip = ClipShape(num_frames, crop_size, patch_size, tubelet_size)
        super().__init__(_samplers([(self.sampler_type, config) for config in configs], clip), seed)


def _samplers(masks: Sequence[tuple[type[MaskSampler], Config]], clip: ClipShape) -> list[MaskSampler]:
    if not masks:
        raise ValueError("mask: the list is empty; give at least one entry")
    samplers = []
    for index, (sampler, config) in enumerate(masks):
        try:
            samplers.append(sampler(config, clip.grid))
        except ValueError as error:
            raise ValueError(f"mask.{index}.{error}") from None
    return samplers
