"""Attention under a pattern with FlexAttention, which skips empty blocks of the mask."""

import functools
import math

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tubelet.grid import Grid
from tubelet.layers.coordinates import locate
from tubelet.layers.patterns import Pattern


@torch.compiler.disable
@functools.lru_cache(maxsize=32)
def block_mask(heads: tuple[Pattern, ...], grid: Grid, block_size: int, device: torch.device) -> BlockMask:
    """Return FlexAttention's block mask of all tokens; blocks of `block_size` tokens without a True entry are skipped.

    It is cached for each grid and built outside of compiled graphs: torch.compile would rebuild it in every forward
    pass.
    """
    pattern_index = {pattern: index for index, pattern in enumerate(dict.fromkeys(heads))}
    pattern_of_head = torch.tensor([pattern_index[pattern] for pattern in heads], device=device)

    def allowed(b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q, k = locate(i, grid), locate(j, grid)
        if len(pattern_index) == 1:
            return heads[0](q, k)
        results = [(pattern_of_head[head] == index) & pattern(q, k) for pattern, index in pattern_index.items()]
        return functools.reduce(torch.logical_or, results)

    n = math.prod(grid)
    return create_block_mask(allowed, None, len(heads), n, n, device=device, BLOCK_SIZE=block_size)


# FlexAttention is fast only when compiled. Compilation happens at the first call.
_flex_attention = torch.compile(flex_attention)


def attend_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """FlexAttention with a block mask: q, k, v [B, heads, N, d] -> [B, heads, N, d].

    Raises:
        ValueError: If `dropout_p` is not 0; FlexAttention has no dropout.
    """
    if dropout_p:
        raise ValueError("FlexAttention does not support attention dropout; set attn_drop to 0")
    return _flex_attention(q, k, v, block_mask=block_mask, scale=scale)
