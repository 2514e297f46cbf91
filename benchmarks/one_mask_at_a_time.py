"""Multi-block masks sampled in a loop over samples and blocks, as in V-JEPA's collator.

The reference of the tests, and the peer of the benchmark.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from tubelet.grid import Grid
from tubelet.masks.multiblock3d import MaskConfig


class Draws(NamedTuple):
    """Random numbers: `uniform(low, high)` returns a float, `below(n)` an integer from 0 to n - 1."""

    uniform: Callable[[float, float], float]
    below: Callable[[int], int | torch.Tensor]


def numpy_draws(rng: np.random.Generator) -> Draws:
    """Draw the same numbers from `rng` as Tubelet's collator."""
    return Draws(rng.uniform, lambda n: int(rng.random() * n))


def torch_draws() -> Draws:
    """Draw from torch's default generator, as in V-JEPA's collator."""
    return Draws(lambda low, high: low + torch.rand(1).item() * (high - low), lambda n: torch.randint(0, n, (1,)))


def masks_one_at_a_time(
    config: MaskConfig, grid: Grid, batch_size: int, draws: Draws
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the token indices outside and inside the blocks of every sample before truncation, lists of [K_i]."""
    temporal_fraction = draws.uniform(*config.temporal_scale)
    spatial_fraction = draws.uniform(*config.spatial_scale)
    height_over_width = draws.uniform(*config.aspect_ratio)
    block_t = max(1, int(temporal_fraction * grid.t))
    patches = int(spatial_fraction * (grid.h * grid.w))
    block_h = min(grid.h, int(round(math.sqrt(patches * height_over_width))))
    block_w = min(grid.w, int(round(math.sqrt(patches / height_over_width))))
    context_length = max(1, int(grid.t * config.max_temporal_keep))

    contexts, targets = [], []
    while len(contexts) < batch_size:
        visible = torch.ones(tuple(grid), dtype=torch.int32)
        for _ in range(config.num_blocks):
            t0 = draws.below(grid.t - block_t + 1)
            y0 = draws.below(grid.h - block_h + 1)
            x0 = draws.below(grid.w - block_w + 1)
            outside_block = torch.ones(tuple(grid), dtype=torch.int32)
            outside_block[t0 : t0 + block_t, y0 : y0 + block_h, x0 : x0 + block_w] = 0
            outside_block[context_length:] = 0
            visible *= outside_block
        visible = visible.flatten()
        if visible.any():
            contexts.append(torch.nonzero(visible)[:, 0])
            targets.append(torch.nonzero(visible == 0)[:, 0])
    return contexts, targets


def cut_at_the_end(
    config: MaskConfig, grid: Grid, seen: list[torch.Tensor], hidden: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Truncate to the first K token indices of each sample, as V-JEPA and V-JEPA 2 do; return [B, K] each."""
    num_seen, num_hidden = min(map(len, seen)), min(map(len, hidden))
    if config.max_keep is not None:
        num_seen = min(num_seen, config.max_keep)
    context = [tokens[:num_seen] for tokens in seen]
    target = [tokens[:num_hidden] for tokens in hidden]
    all_tokens = set(range(math.prod(grid)))
    if config.full_complement:
        target = [torch.tensor(sorted(all_tokens - set(tokens.tolist()))) for tokens in context]
    if config.pred_full_complement:
        context = [torch.tensor(sorted(all_tokens - set(tokens.tolist()))) for tokens in target]
    if config.inv_block:
        context, target = target, context
    return torch.stack(context), torch.stack(target)
