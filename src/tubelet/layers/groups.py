"""Factorized attention: over space (within a frame) and over time (within a spatial location).

It works on all tokens of a grid or on the subset that masking keeps. A frame is a temporal index of the token grid.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tubelet.grid import Grid

Axis = Literal["time", "space"]


@dataclass(frozen=True)
class Groups:
    """Partition of the tokens of a grid into groups that attend within themselves.

    Kept tokens leave groups of different sizes. They are padded to the full size, and `mask` marks the padding. Padding
    exists only inside token mixing; all other layers see the kept tokens alone.

    Args:
        grid: Token grid (t, h, w).
        axis: `time` groups the tokens of a spatial location, `space` the tokens of a frame.
        keep: Indices [B, K] of the kept tokens; all tokens if None.
    """

    grid: Grid
    axis: Axis
    keep: Tensor | None = None

    def num_tokens(self) -> int:
        """Return the number of tokens: K, or N if all tokens are kept."""
        return math.prod(self.grid) if self.keep is None else self.keep.shape[1]

    def split(self, x: Tensor) -> Tensor:
        """Split tokens into padded groups: [B, N or K, heads, d] -> [groups, heads, group size, d]."""
        if self.keep is not None:
            empty = x.new_zeros(len(x), math.prod(self.grid), *x.shape[2:])
            x = empty.scatter(1, self.keep[..., None, None].expand_as(x), x)
        t, h, w = self.grid
        if self.axis == "time":
            return rearrange(x, "B (t h w) H d -> (B h w) H t d", t=t, h=h, w=w)
        return rearrange(x, "B (t h w) H d -> (B t) H (h w) d", t=t, h=h, w=w)

    def merge(self, x: Tensor) -> Tensor:
        """Undo `split`: [groups, heads, group size, d] -> [B, N or K, heads, d]."""
        t, h, w = self.grid
        if self.axis == "time":
            x = rearrange(x, "(B h w) H t d -> B (t h w) H d", h=h, w=w)
        else:
            x = rearrange(x, "(B t) H (h w) d -> B (t h w) H d", t=t, h=h, w=w)
        return x if self.keep is None else x.gather(1, self.keep[..., None, None].expand(-1, -1, *x.shape[2:]))

    def mask(self) -> Tensor | None:
        """Return the attention mask [groups, 1, 1, group size], True for kept tokens; None if all tokens are kept.

        It is also True throughout groups without any token, whose softmax would be NaN otherwise.
        """
        if self.keep is None:
            return None
        ones = torch.ones(*self.keep.shape, 1, 1, device=self.keep.device)
        is_kept = self.split(ones).transpose(-1, -2) > 0
        return is_kept | ~is_kept.any(dim=-1, keepdim=True)


class FoldedTokens:
    """Softmax attention over space and over time for a complete grid: groups of equal size fold into the batch.

    `over_space` and `over_time` are attention functions for `Attention.forward`. `join` prepends the CLS token of each
    frame to its patches; `over_space` then includes it.

    Args:
        grid: Token grid (t, h, w).
    """

    def __init__(self, grid: Grid):
        self.t, self.n = grid.t, grid.tokens_per_frame

    def over_space(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention within each frame."""
        tokens = q.shape[2] // self.t  # n, or 1 + n with the CLS token of the frame
        return _attend_within(Groups(Grid(self.t, tokens, 1), "space"), q, k, v, options)

    def over_time(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention within each spatial location."""
        return _attend_within(Groups(Grid(self.t, self.n, 1), "time"), q, k, v, options)

    def join(self, frames: Tensor, x: Tensor) -> Tensor:
        """Prepend the CLS token of each frame [B, t, D] to its patches [B, t*n, D] -> [B, t*(1+n), D]."""
        return torch.cat([frames[:, :, None], x.unflatten(1, (self.t, self.n))], dim=2).flatten(1, 2)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `join`: return frame CLS tokens [B, t, D] and patches [B, t*n, D]."""
        y = y.unflatten(1, (self.t, 1 + self.n))
        return y[:, :, 0], y[:, :, 1:].flatten(1, 2)

    def expand_frames(self, frames: Tensor) -> Tensor:
        """Repeat the vector of each frame [B, t, D] for its tokens -> [B, t*n, D]."""
        return frames.repeat_interleave(self.n, dim=1)


class ScatteredTokens:
    """The interface of `FoldedTokens` for an arbitrary subset of the tokens of a grid, in any order.

    Groups have different sizes, so attention runs over all kept tokens under a mask that allows pairs of one group. The
    CLS token of a frame without kept patches remains and attends to itself.

    Args:
        keep: Indices [B, K] of the kept tokens.
        grid: Token grid (t, h, w).
    """

    def __init__(self, keep: Tensor, grid: Grid):
        self.t, n = grid.t, grid.tokens_per_frame
        self.frame = keep // n
        # `join` puts the frame CLS tokens first.
        frame = torch.cat([torch.arange(self.t, device=keep.device).expand(len(keep), -1), self.frame], dim=1)
        self.same_frame = _equal_pairs(frame)
        self.same_location = _equal_pairs(keep % n)

    def over_space(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention within each frame."""
        N = q.shape[2]  # K, or t + K with the frame CLS tokens
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.same_frame[..., -N:, -N:], **options)

    def over_time(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention within each spatial location."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.same_location, **options)

    def join(self, frames: Tensor, x: Tensor) -> Tensor:
        """Prepend all frame CLS tokens [B, t, D] to the kept patches [B, K, D] -> [B, t + K, D]."""
        return torch.cat([frames, x], dim=1)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `join`: return frame CLS tokens [B, t, D] and patches [B, K, D]."""
        return y[:, : self.t], y[:, self.t :]

    def expand_frames(self, frames: Tensor) -> Tensor:
        """Repeat the vector of each frame [B, t, D] for its kept tokens -> [B, K, D]."""
        return frames.gather(1, self.frame[..., None].expand(-1, -1, frames.shape[-1]))


def tube_grid(keep: Tensor, grid: Grid) -> Grid:
    """Return the grid (t, s, 1) of tube-masked tokens: the same s spatial locations in all t frames, in order.

    Args:
        keep: Indices [B, t*s] of the kept tokens.
        grid: Token grid (t, h, w).

    Raises:
        ValueError: If the number of kept tokens is not a multiple of t.
        RuntimeError: If the tokens are not tubes. On a GPU it is raised asynchronously, without a device-to-host
            synchronization here.
    """
    (B, K), (t, h, w) = keep.shape, grid
    if K % t:
        raise ValueError(f"{K} kept tokens do not form tubes through {t} frames of tokens; set tube_masks to False")
    first_token = torch.arange(t, device=keep.device)[:, None] * (h * w)
    tubes = first_token + keep[:, None, : K // t]
    torch._assert_async((keep.view(B, t, -1) == tubes).all(), "kept tokens are not tubes; set tube_masks to False")
    return Grid(t, K // t, 1)


def _attend_within(groups: Groups, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    q, k, v = (groups.split(x.transpose(1, 2)) for x in (q, k, v))
    return groups.merge(F.scaled_dot_product_attention(q, k, v, **options)).transpose(1, 2)


def _equal_pairs(group: Tensor) -> Tensor:
    """Return which pairs of tokens have equal group numbers: [B, K] -> bool [B, 1, K, K], broadcast over heads."""
    return group[:, None, :, None] == group[:, None, None, :]
