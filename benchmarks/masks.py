"""Masks of V-JEPA's ViT-L/16 configuration for a batch of 24, against one mask at a time in a loop.

python -m benchmarks masks
"""

import numpy as np

from benchmarks.harness import Row, in_turn
from benchmarks.one_mask_at_a_time import cut_at_the_end, masks_one_at_a_time, torch_draws
from tubelet.masks.multiblock3d import MaskCollator

BATCH_SIZE = 24
MASKS = [
    {"num_blocks": 8, "spatial_scale": (0.15, 0.15), "aspect_ratio": (0.75, 1.5)},
    {"num_blocks": 2, "spatial_scale": (0.7, 0.7), "aspect_ratio": (0.75, 1.5)},
]


def run(repeats: int = 15) -> list[Row]:
    """Both masks together; one row for our cut, one for V-JEPA's."""
    return [
        _row("masks, batch of 24, tubes stay whole", "random", repeats, goal=20.0),
        _row("masks, batch of 24, V-JEPA's cut", "first", repeats, goal=None),
    ]


def _row(name: str, truncate: str, repeats: int, goal: float | None) -> Row:
    collator = MaskCollator(MASKS, crop_size=224, num_frames=16, patch_size=16, tubelet_size=2, truncate=truncate)
    rng, draws = np.random.default_rng(0), torch_draws()
    batches = 10  # of ours in a turn: one is too short to time

    def ours():
        for _ in range(batches):
            collator.sample_masks(BATCH_SIZE, rng)

    def peer():
        for config in collator.configs:
            seen, hidden = masks_one_at_a_time(config, collator.grid, BATCH_SIZE, draws)
            cut_at_the_end(config, collator.grid, seen, hidden)

    timing = in_turn(ours, peer, repeats)
    return Row(
        name,
        f"{timing.ours / batches * 1e3:.2f} ms",
        f"{timing.peer * 1e3:.1f} ms",
        timing.ratio * batches,
        goal,
    )
