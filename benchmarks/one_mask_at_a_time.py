"""Multi-block masks drawn the obvious way: one sample, one block, one mask at a time, as V-JEPA's collator does.

The tests take it as the reference, the benchmark as the peer.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from tubelet.masks import Grid
from tubelet.masks.multiblock3d import MaskConfig


class Draws(NamedTuple):
    """uniform(low, high): a float between them. below(n): a whole number from 0 to n - 1."""

    uniform: Callable[[float, float], float]
    below: Callable[[int], int | torch.Tensor]


def numpy_draws(rng: np.random.Generator) -> Draws:
    """The numbers that tubelet's collator draws from `rng`, in the same order."""
    return Draws(rng.uniform, lambda n: int(rng.random() * n))


def torch_draws() -> Draws:
    """From torch's global generator, as V-JEPA's collator draws them."""
    return Draws(lambda low, high: low + torch.rand(1).item() * (high - low), lambda n: torch.randint(0, n, (1,)))


def masks_one_at_a_time(
    config: MaskConfig, grid: Grid, batch_size: int, draws: Draws
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token numbers outside and inside the blocks of every sample, before anything is cut: lists of [K_i]."""
    slot_share = draws.uniform(*config.temporal_scale)
    plane_share = draws.uniform(*config.spatial_scale)
    height_over_width = draws.uniform(*config.aspect_ratio)
    block_t = max(1, int(slot_share * grid.t))
    patches = int(plane_share * (grid.h * grid.w))
    block_h = min(grid.h, int(round(math.sqrt(patches * height_over_width))))
    block_w = min(grid.w, int(round(math.sqrt(patches / height_over_width))))
    context_slots = max(1, int(grid.t * config.max_temporal_keep))

    seen_of_all, hidden_of_all = [], []
    while len(seen_of_all) < batch_size:
        visible = torch.ones(tuple(grid), dtype=torch.int32)
        for _ in range(config.num_blocks):
            t0 = draws.below(grid.t - block_t + 1)
            y0 = draws.below(grid.h - block_h + 1)
            x0 = draws.below(grid.w - block_w + 1)
            outside_block = torch.ones(tuple(grid), dtype=torch.int32)
            outside_block[t0 : t0 + block_t, y0 : y0 + block_h, x0 : x0 + block_w] = 0
            outside_block[context_slots:] = 0
            visible *= outside_block
        visible = visible.flatten()
        if visible.any():
            seen_of_all.append(torch.nonzero(visible)[:, 0])
            hidden_of_all.append(torch.nonzero(visible == 0)[:, 0])
    return seen_of_all, hidden_of_all


def cut_at_the_end(
    config: MaskConfig, grid: Grid, seen: list[torch.Tensor], hidden: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What V-JEPA and V-JEPA 2 make of them: the first K token numbers of each sample, [B, K]."""
    num_seen, num_hidden = min(map(len, seen)), min(map(len, hidden))
    if config.max_keep is not None:
        num_seen = min(num_seen, config.max_keep)
    context = [tokens[:num_seen] for tokens in seen]
    target = [tokens[:num_hidden] for tokens in hidden]
    everything = set(range(math.prod(grid)))
    if config.full_complement:
        target = [torch.tensor(sorted(everything - set(tokens.tolist()))) for tokens in context]
    if config.pred_full_complement:
        context = [torch.tensor(sorted(everything - set(tokens.tolist()))) for tokens in target]
    if config.inv_block:
        context, target = target, context
    return torch.stack(context), torch.stack(target)
