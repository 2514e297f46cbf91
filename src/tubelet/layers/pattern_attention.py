"""Attention under the patterns of tubelet.layers.patterns, with the fastest exact implementation for each case."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from tubelet.grid import Grid
from tubelet.layers.attention import AttentionFn
from tubelet.layers.coordinates import locate
from tubelet.layers.patterns import Lookahead, Lookback, Pattern, Window


def pattern_attention(
    heads: tuple[Pattern, ...],
    grid: Grid,
    keep: Tensor | None,
    device: torch.device,
    head_dim: int,
    block_size: int = 128,
    tubes: bool = False,
    frame_sizes: Sequence[int] | None = None,
) -> AttentionFn:
    """Return the attention function for a pattern. In order of preference:

    1. A window pattern folds the windows into the batch.
    2. All tokens of the grid on CUDA use FlexAttention, which skips empty blocks of the mask. It needs heads of at
       least 16 channels, has no backward pass on the CPU, and would need a new block mask in every step for kept
       tokens.
    3. Lookback and lookahead heads run frame by frame.
    4. Otherwise scaled_dot_product_attention with a boolean mask.

    Args:
        heads: One pattern for each head, or a single one for all heads.
        grid: Token grid (t, h, w).
        keep: Indices [B, K] of the kept tokens; all tokens if None.
        device: Device of the tokens.
        head_dim: Channels per head.
        block_size: Block size of FlexAttention's mask in tokens.
        tubes: `keep` holds the same spatial locations in every frame (tube masking).
        frame_sizes: Number of tokens of each frame in `keep`, if they are sorted by frame; unknown if None.
    """
    if len(heads) == 1 and isinstance(heads[0], Window) and (keep is None or tubes):
        if keep is None:
            return partial(_attend_in_windows, window=heads[0], grid=grid)
        return partial(_attend_in_windows_of_tubes, window=heads[0], grid=grid, keep=keep)
    if keep is None and device.type == "cuda" and head_dim >= 16:
        # torch's compiler is imported only where it is needed: that takes a second, and asks for the number of GPUs,
        # after which no fork of the process can use them.
        from tubelet.layers.block_attention import attend_by_blocks, block_mask

        return partial(attend_by_blocks, block_mask=block_mask(heads, grid, block_size, device))
    if keep is None:
        frame_sizes = [grid[1] * grid[2]] * grid[0]
    if frame_sizes is not None and all(isinstance(pattern, Lookback | Lookahead) for pattern in heads):
        return partial(attend_frame_by_frame, heads=heads, frame_sizes=frame_sizes)
    return partial(F.scaled_dot_product_attention, attn_mask=boolean_mask(heads, grid, keep, device))


def boolean_mask(
    heads: tuple[Pattern, ...], grid: Grid, keep: Tensor | None = None, device: torch.device | None = None
) -> Tensor:
    """Return the mask of query-key pairs, True where a query attends to a key.

    Args:
        heads: One pattern for each head, or a single one for all heads.
        grid: Token grid (t, h, w).
        keep: Indices [B, K] of the kept tokens; all N tokens if None.
        device: Device of the mask if `keep` is None.

    Returns:
        Bool [B, len(heads), K, K], or [1, len(heads), N, N] for all tokens.
    """
    index = torch.arange(math.prod(grid), device=device)[None] if keep is None else keep
    q, k = locate(index[:, :, None], grid), locate(index[:, None, :], grid)
    allowed = {pattern: pattern(q, k) for pattern in dict.fromkeys(heads)}
    return torch.stack([allowed[pattern] for pattern in heads], dim=1)


def attend_frame_by_frame(
    q: Tensor, k: Tensor, v: Tensor, heads: tuple[Pattern, ...], frame_sizes: Sequence[int], **options: Any
) -> Tensor:
    """Attention of Lookback and Lookahead heads without a mask, at half the cost of masked attention.

    The queries of a frame attend to the keys up to the last token of the frame (Lookback) or from its first token on
    (Lookahead).

    Args:
        q: Queries [B, heads, N, d], sorted by frame.
        k: Keys of the same shape.
        v: Values of the same shape.
        heads: The pattern of each head, or a single one for all heads.
        frame_sizes: Number of tokens of each frame; they add up to N.
        **options: Further arguments of scaled_dot_product_attention.

    Returns:
        Mixed values [B, heads, N, d].
    """
    heads = heads * q.shape[1] if len(heads) == 1 else heads
    outputs, first_head = [], 0
    for is_lookback, run in itertools.groupby([isinstance(pattern, Lookback) for pattern in heads]):
        h = slice(first_head, first_head := first_head + len(list(run)))
        frames, start = [], 0
        for size in frame_sizes:
            end = start + size
            keys = slice(0, end) if is_lookback else slice(start, None)
            frames.append(F.scaled_dot_product_attention(q[:, h, start:end], k[:, h, keys], v[:, h, keys], **options))
            start = end
        outputs.append(torch.cat(frames, dim=2))
    return torch.cat(outputs, dim=1)


def _attend_in_windows(q: Tensor, k: Tensor, v: Tensor, window: Window, grid: Grid, **options: Any) -> Tensor:
    """Attention within windows, which are folded into the batch: q, k, v [B, heads, N, d] -> [B, heads, N, d].

    Padding before the first token shifts the window borders; padding after the last token completes the last window.
    """
    (t, h, w), (s, p, r) = grid, window.size
    front, back = _padding(window, grid)
    a, b, c = ((n + f + e) // size for n, f, e, size in zip(grid, front, back, window.size, strict=True))

    def fold(x: Tensor) -> Tensor:
        x = rearrange(x, "B heads (t h w) d -> B heads t h w d", t=t, h=h, w=w)
        x = F.pad(x, (0, 0, front[2], back[2], front[1], back[1], front[0], back[0]))
        return rearrange(x, "B heads (a s) (b p) (c r) d -> (B a b c) heads (s p r) d", s=s, p=p, r=r)

    not_padding = None
    if any(front + back):
        not_padding = fold(torch.ones(len(q), 1, t * h * w, 1, dtype=torch.bool, device=q.device)).mT
    x = F.scaled_dot_product_attention(fold(q), fold(k), fold(v), attn_mask=not_padding, **options)
    x = rearrange(x, "(B a b c) heads (s p r) d -> B heads (a s) (b p) (c r) d", a=a, b=b, c=c, s=s, p=p)
    x = x[:, :, front[0] : front[0] + t, front[1] : front[1] + h, front[2] : front[2] + w]
    return rearrange(x, "B heads t h w d -> B heads (t h w) d")


def _attend_in_windows_of_tubes(
    q: Tensor, k: Tensor, v: Tensor, window: Window, grid: Grid, keep: Tensor, **options: Any
) -> Tensor:
    """Attention within windows for tube-masked tokens `keep` [B, K].

    Windows are folded along time only; in space a mask separates them.
    """
    t, s = grid[0], window.size[0]
    tokens_per_frame = keep.shape[1] // t
    (front, *_), (back, *_) = _padding(window, grid)
    a = (t + front + back) // s

    def fold(x: Tensor) -> Tensor:
        x = F.pad(rearrange(x, "B heads (t n) d -> B heads t n d", t=t), (0, 0, 0, 0, front, back))
        return rearrange(x, "B heads (a s) n d -> (B a) heads (s n) d", s=s)

    # The tokens of the first frame determine which spatial locations share a window.
    allowed = boolean_mask((window,), grid, keep[:, :tokens_per_frame])
    allowed = repeat(allowed, "B 1 n m -> (B a) 1 (s n) (z m)", a=a, s=s, z=s)
    if front + back:
        allowed = allowed & fold(torch.ones(len(q), 1, keep.shape[1], 1, dtype=torch.bool, device=q.device)).mT
    x = F.scaled_dot_product_attention(fold(q), fold(k), fold(v), attn_mask=allowed, **options)
    x = rearrange(x, "(B a) heads (s n) d -> B heads (a s) n d", a=a, s=s)[:, :, front : front + t]
    return rearrange(x, "B heads t n d -> B heads (t n) d")


def _padding(window: Window, grid: Grid) -> tuple[list[int], list[int]]:
    """Return the padding before and after each axis that makes it a multiple of the window size."""
    front = [(size - shift) % size for size, shift in zip(window.size, window.shift, strict=True)]
    back = [-(n + f) % size for n, f, size in zip(grid, front, window.size, strict=True)]
    return front, back
