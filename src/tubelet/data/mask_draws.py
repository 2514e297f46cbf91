"""From which random generators the masks of a run are drawn."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from tubelet.data.options import MaskLengths
from tubelet.runtime.seeds import Purpose, numpy_generator


class MaskSampler(Protocol):
    """The part of a mask collator that a loader uses."""

    def sample_masks(
        self, batch_size: int, rng: np.random.Generator, shared: np.random.Generator | None
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the context and target tokens of each mask: two sequences of int64 [batch_size, K].

        With `shared`, each K depends on `batch_size` and that generator alone.
        """
        ...


def draw_masks(
    masks: MaskSampler, batch_size: int, *, seed: int, step: int, group: int, lengths: MaskLengths
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Draw the masks of a group of clips of a step.

    Args:
        masks: Draws the masks.
        batch_size: Number of clips of the group.
        seed: Seed of the masks of the run.
        step: Step of the run.
        group: Index of the group in the global batch.
        lengths: See `DataConfig.mask_lengths`.

    Returns:
        The context and target tokens of each mask, int64 [batch_size, K].
    """
    shared = numpy_generator(seed, Purpose.MASK_LENGTHS, step) if lengths == "shared" else None
    return masks.sample_masks(batch_size, numpy_generator(seed, Purpose.MASKS, step, group), shared)
