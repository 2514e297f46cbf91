"""Sampling of the masks of V-JEPA's ViT-L/16 for a batch of 24, compared with a loop over single masks.

python -m benchmarks masks
"""

import numpy as np

from benchmarks.harness import Row, time_alternately
from benchmarks.one_mask_at_a_time import cut_at_the_end, masks_one_at_a_time, torch_draws
from tubelet.masks.multiblock3d import MaskCollator

BATCH_SIZE = 24
MASKS = [
    {"num_blocks": 8, "spatial_scale": (0.15, 0.15), "aspect_ratio": (0.75, 1.5)},
    {"num_blocks": 2, "spatial_scale": (0.7, 0.7), "aspect_ratio": (0.75, 1.5)},
]


def run(repeats: int = 15) -> list[Row]:
    """Compare both ways to truncate masks to equal length: Tubelet's and V-JEPA's."""
    return [
        _row("masks, batch of 24, random tubes truncated", "random", repeats, goal=20.0),
        _row("masks, batch of 24, last indices truncated as in V-JEPA", "first", repeats, goal=None),
    ]


def _row(name: str, truncate: str, repeats: int, goal: float | None) -> Row:
    collator = MaskCollator(MASKS, crop_size=224, num_frames=16, patch_size=16, tubelet_size=2, truncate=truncate)
    rng, draws = np.random.default_rng(0), torch_draws()
    batches = 10  # per timed call of ours, since a single one is too fast to time

    def ours() -> None:
        for _ in range(batches):
            collator.sample_masks(BATCH_SIZE, rng)

    def peer() -> None:
        for config in collator.configs:
            seen, hidden = masks_one_at_a_time(config, collator.grid, BATCH_SIZE, draws)
            cut_at_the_end(config, collator.grid, seen, hidden)

    timing = time_alternately(ours, peer, repeats)
    return Row(
        name,
        f"{timing.ours / batches * 1e3:.2f} ms",
        f"{timing.peer * 1e3:.1f} ms",
        timing.ratio * batches,
        goal,
    )
