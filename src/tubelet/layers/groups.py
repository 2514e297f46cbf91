"""Attention within frames (over space) and within places (over time), of all tokens of a grid or of some of them."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tubelet.layers.positions import Grid

Axis = Literal["time", "space"]


@dataclass(frozen=True)
class Groups:
    """Which tokens of a grid belong together: along `time` those of one place, along `space` those of one frame.

    `keep` [B, K] are the indices of the tokens that exist, all if None. Groups of different sizes are filled up to the
    grid's size; `mask` tells the filled slots from the others. Only mixing sees the filled slots, no other layer does.
    """

    grid: Grid
    axis: Axis
    keep: Tensor | None = None

    def num_tokens(self) -> int:
        """K, or N where all tokens exist."""
        return math.prod(self.grid) if self.keep is None else self.keep.shape[1]

    def split(self, x: Tensor) -> Tensor:
        """[B, N or K, heads, width] -> [groups, heads, tokens of a group, width]."""
        if self.keep is not None:
            empty = x.new_zeros(len(x), math.prod(self.grid), *x.shape[2:])
            x = empty.scatter(1, self.keep[..., None, None].expand_as(x), x)
        t, h, w = self.grid
        if self.axis == "time":
            return rearrange(x, "B (t h w) H d -> (B h w) H t d", t=t, h=h, w=w)
        return rearrange(x, "B (t h w) H d -> (B t) H (h w) d", t=t, h=h, w=w)

    def merge(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        t, h, w = self.grid
        if self.axis == "time":
            x = rearrange(x, "(B h w) H t d -> B (t h w) H d", h=h, w=w)
        else:
            x = rearrange(x, "(B t) H (h w) d -> B (t h w) H d", t=t, h=h, w=w)
        return x if self.keep is None else x.gather(1, self.keep[..., None, None].expand(-1, -1, *x.shape[2:]))

    def mask(self) -> Tensor | None:
        """Bool [groups, 1, 1, tokens of a group], True where a token exists and throughout a group that has none."""
        if self.keep is None:
            return None
        ones = torch.ones(*self.keep.shape, 1, 1, device=self.keep.device)
        exists = self.split(ones).transpose(-1, -2) > 0
        return exists | ~exists.any(dim=-1, keepdim=True)


class FoldedTokens:
    """Softmax attention within frames and places that are all of one size: they are folded into the batch.

    `over_space` and `over_time` are what Attention calls `attend`. `join` puts a token of every frame, [B, t, D],
    before its patches; `over_space` then takes it along.
    """

    def __init__(self, grid: Grid):
        self.t, self.n = grid[0], grid[1] * grid[2]

    def over_space(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        tokens = q.shape[2] // self.t  # n, or 1 + n with the token of the frame
        return _attend_within(Groups((self.t, tokens, 1), "space"), q, k, v, options)

    def over_time(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return _attend_within(Groups((self.t, self.n, 1), "time"), q, k, v, options)

    def join(self, frames: Tensor, x: Tensor) -> Tensor:
        """[B, t, D] and [B, t*n, D] -> [B, t*(1+n), D]."""
        return torch.cat([frames[:, :, None], x.unflatten(1, (self.t, self.n))], dim=2).flatten(1, 2)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y.unflatten(1, (self.t, 1 + self.n))
        return y[:, :, 0], y[:, :, 1:].flatten(1, 2)

    def frame_of_each(self, frames: Tensor) -> Tensor:
        """[B, t, D] -> [B, t*n, D]: for every token the entry of its frame."""
        return frames.repeat_interleave(self.n, dim=1)


class ScatteredTokens:
    """The same as FoldedTokens for the tokens `keep` [B, K] of a grid, any subset in any order: groups are ragged then,
    so attention runs over all kept tokens with those of other groups masked.

    The token of a frame stays where no patch of the frame is kept; it sees itself alone.
    """

    def __init__(self, keep: Tensor, grid: Grid):
        self.t, n = grid[0], grid[1] * grid[2]
        self.frame = keep // n
        # `join` puts the tokens of the frames first.
        frame = torch.cat([torch.arange(self.t, device=keep.device).expand(len(keep), -1), self.frame], dim=1)
        self.same_frame = _equal_pairs(frame)
        self.same_place = _equal_pairs(keep % n)

    def over_space(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        N = q.shape[2]  # K, or t + K with the tokens of the frames
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.same_frame[..., -N:, -N:], **options)

    def over_time(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.same_place, **options)

    def join(self, frames: Tensor, x: Tensor) -> Tensor:
        return torch.cat([frames, x], dim=1)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return y[:, : self.t], y[:, self.t :]

    def frame_of_each(self, frames: Tensor) -> Tensor:
        return frames.gather(1, self.frame[..., None].expand(-1, -1, frames.shape[-1]))


def grid_of_tubes(keep: Tensor, grid: Grid) -> Grid:
    """The grid (t, s, 1) that tokens `keep` [B, t*s] fill if they hold the same s places in all t time slots, in order.

    RuntimeError if they do not, on a GPU once it gets there: nothing waits for the device.
    """
    (B, K), (t, h, w) = keep.shape, grid
    if K % t:
        raise ValueError(f"{K} kept tokens are no tubes through {t} time slots; set tube_masks to False")
    slots = torch.arange(t, device=keep.device)[:, None] * (h * w)
    tubes = slots + keep[:, None, : K // t]
    torch._assert_async((keep.view(B, t, -1) == tubes).all(), "kept tokens are no tubes; set tube_masks to False")
    return t, K // t, 1


def _attend_within(groups: Groups, q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
    q, k, v = (groups.split(x.transpose(1, 2)) for x in (q, k, v))
    return groups.merge(F.scaled_dot_product_attention(q, k, v, **options)).transpose(1, 2)


def _equal_pairs(group: Tensor) -> Tensor:
    """[B, K] -> which tokens are of one group, [B, 1 for the heads, K, K]."""
    return group[:, None, :, None] == group[:, None, None, :]
