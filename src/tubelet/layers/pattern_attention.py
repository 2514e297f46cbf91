"""Attention under the patterns of tubelet.layers.patterns, by the fastest way that gives their numbers."""

import functools
import itertools
import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tubelet.layers.attention import Attend
from tubelet.layers.patterns import Lookahead, Lookback, Pattern, Window
from tubelet.layers.positions import Grid, locate


def attention_under(
    heads: tuple[Pattern, ...],
    grid: Grid,
    keep: Tensor | None,
    like: Tensor,
    head_dim: int,
    block_size: int = 128,
    tubes: bool = False,
    frames: Sequence[int] | None = None,
) -> Attend:
    """Attention among all tokens of the grid, or among `keep` [B, K], on the device of `like`.

    `heads` holds a pattern for each head, or one for all of them; `tubes` says that `keep` holds the same places in
    every time slot, `frames` how many tokens of each frame it holds, where they come frame by frame. Windows become
    clips of their own. Otherwise all tokens on CUDA take FlexAttention's kernel, which leaves out blocks of
    `block_size` tokens: on the CPU it has no backward pass, for kept tokens a block mask would have to be made anew at
    each step, and for heads of less than 16 channels there is no kernel. Heads that look back or ahead then go frame by
    frame, and everything else takes scaled_dot_product_attention with the predicate as a mask.
    """
    if len(heads) == 1 and isinstance(heads[0], Window) and (keep is None or tubes):
        if keep is None:
            return partial(_attend_in_windows, window=heads[0], grid=grid)
        return partial(_attend_in_windows_of_tubes, window=heads[0], grid=grid, keep=keep)
    if keep is None and like.is_cuda and head_dim >= 16:
        return partial(attend_by_blocks, block_mask=block_mask(heads, grid, block_size, like.device))
    if keep is None:
        frames = [grid[1] * grid[2]] * grid[0]
    if frames is not None and all(isinstance(pattern, Lookback | Lookahead) for pattern in heads):
        return partial(attend_frame_by_frame, heads=heads, frames=frames)
    return partial(F.scaled_dot_product_attention, attn_mask=boolean_mask(heads, grid, keep, like.device))


def boolean_mask(heads: tuple[Pattern, ...], grid: Grid, keep: Tensor | None = None, device=None) -> Tensor:
    """Where queries attend to keys: bool [1 or B, len(heads), K, K], of all tokens or of `keep` [B, K]."""
    index = torch.arange(math.prod(grid), device=device)[None] if keep is None else keep
    q, k = locate(index[:, :, None], grid), locate(index[:, None, :], grid)
    allowed = {pattern: pattern(q, k) for pattern in dict.fromkeys(heads)}
    return torch.stack([allowed[pattern] for pattern in heads], dim=1)


@torch.compiler.disable
@functools.lru_cache(maxsize=32)
def block_mask(heads: tuple[Pattern, ...], grid: Grid, block_size: int, device: torch.device) -> BlockMask:
    """The mask of all tokens for FlexAttention, which skips blocks of `block_size` tokens without a true entry.

    It is made once for a grid, outside of a compiled graph: torch.compile would make it anew in every forward pass.
    """
    numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(heads))}
    number_of_head = torch.tensor([numbers[pattern] for pattern in heads], device=device)

    def allowed(b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q, k = locate(i, grid), locate(j, grid)
        if len(numbers) == 1:
            return heads[0](q, k)
        results = [(number_of_head[head] == number) & pattern(q, k) for pattern, number in numbers.items()]
        return functools.reduce(torch.logical_or, results)

    n = math.prod(grid)
    return create_block_mask(allowed, None, len(heads), n, n, device=device, BLOCK_SIZE=block_size)


# FlexAttention is fast only as a compiled kernel; nothing is compiled before the first call.
_flex_attention = torch.compile(flex_attention)


def attend_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, dropout_p: float = 0.0, scale: float | None = None
) -> Tensor:
    """FlexAttention, [B, heads, N, d] each -> [B, heads, N, d]; ValueError for dropout, which it has not."""
    if dropout_p:
        raise ValueError("FlexAttention cannot drop attention weights; set attn_drop to 0")
    return _flex_attention(q, k, v, block_mask=block_mask, scale=scale)


def attend_frame_by_frame(
    q: Tensor, k: Tensor, v: Tensor, heads: tuple[Pattern, ...], frames: Sequence[int], **options
) -> Tensor:
    """[B, heads, N, d] each -> [B, heads, N, d]: `heads` of Lookback and Lookahead without a mask, and half the work.

    `frames` holds the number of tokens of each frame, which come one after another. A frame's queries attend to the
    keys up to its last token, or from its first one on.
    """
    parts, first_head = [], 0
    for looks_back, run in itertools.groupby([isinstance(pattern, Lookback) for pattern in heads]):
        own = slice(first_head, first_head := first_head + len(list(run)))
        of_frames, first = [], 0
        for size in frames:
            last = first + size
            seen = slice(0, last) if looks_back else slice(first, None)
            of_frames.append(
                F.scaled_dot_product_attention(q[:, own, first:last], k[:, own, seen], v[:, own, seen], **options)
            )
            first = last
        parts.append(torch.cat(of_frames, dim=2))
    return torch.cat(parts, dim=1)


def _attend_in_windows(q: Tensor, k: Tensor, v: Tensor, window: Window, grid: Grid, **options) -> Tensor:
    """[B, heads, N, d] each -> [B, heads, N, d]: attention with every window as a clip of its own.

    Padding before the first token shifts the windows; padding after the last one fills the last window.
    """
    (t, h, w), (s, p, r) = grid, window.size
    front, back = _padding(window, grid)
    a, b, c = ((n + f + e) // size for n, f, e, size in zip(grid, front, back, window.size, strict=True))

    def fold(x: Tensor) -> Tensor:
        x = rearrange(x, "B heads (t h w) d -> B heads t h w d", t=t, h=h, w=w)
        x = F.pad(x, (0, 0, front[2], back[2], front[1], back[1], front[0], back[0]))
        return rearrange(x, "B heads (a s) (b p) (c r) d -> (B a b c) heads (s p r) d", s=s, p=p, r=r)

    real = None
    if any(front + back):
        real = fold(torch.ones(len(q), 1, t * h * w, 1, dtype=torch.bool, device=q.device)).mT
    x = F.scaled_dot_product_attention(fold(q), fold(k), fold(v), attn_mask=real, **options)
    x = rearrange(x, "(B a b c) heads (s p r) d -> B heads (a s) (b p) (c r) d", a=a, b=b, c=c, s=s, p=p)
    x = x[:, :, front[0] : front[0] + t, front[1] : front[1] + h, front[2] : front[2] + w]
    return rearrange(x, "B heads t h w d -> B heads (t h w) d")


def _attend_in_windows_of_tubes(
    q: Tensor, k: Tensor, v: Tensor, window: Window, grid: Grid, keep: Tensor, **options
) -> Tensor:
    """The same for tokens `keep` [B, K] of whole columns: windows are folded along time, and a mask in space."""
    t, s = grid[0], window.size[0]
    columns = keep.shape[1] // t
    (front, *_), (back, *_) = _padding(window, grid)
    a = (t + front + back) // s

    def fold(x: Tensor) -> Tensor:
        x = F.pad(rearrange(x, "B heads (t n) d -> B heads t n d", t=t), (0, 0, 0, 0, front, back))
        return rearrange(x, "B heads (a s) n d -> (B a) heads (s n) d", s=s)

    # The tokens of the first slot tell which columns share a window.
    allowed = repeat(boolean_mask((window,), grid, keep[:, :columns]), "B 1 n m -> (B a) 1 (s n) (z m)", a=a, s=s, z=s)
    if front + back:
        allowed = allowed & fold(torch.ones(len(q), 1, keep.shape[1], 1, dtype=torch.bool, device=q.device)).mT
    x = F.scaled_dot_product_attention(fold(q), fold(k), fold(v), attn_mask=allowed, **options)
    x = rearrange(x, "(B a) heads (s n) d -> B heads (a s) n d", a=a, s=s)[:, :, front : front + t]
    return rearrange(x, "B heads t n d -> B heads (t n) d")


def _padding(window: Window, grid: Grid) -> tuple[list[int], list[int]]:
    """Places to add before and after each axis, so that whole windows fill it."""
    front = [(size - shift) % size for size, shift in zip(window.size, window.shift, strict=True)]
    back = [-(n + f) % size for n, f, size in zip(grid, front, window.size, strict=True)]
    return front, back
