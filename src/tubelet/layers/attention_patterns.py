"""Which tokens attend to which: predicates on (t, y, x) that compose with & and |, and attention under them.

Every pattern lets a token attend to itself, and so do all compositions: no query is ever left without a key, whichever
tokens are kept.
"""

import ast
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from tubelet.layers.attention import Attention
from tubelet.layers.block import Block
from tubelet.layers.positions import Grid, RopeTables, rotate

# Queries, keys, values, each [B, heads, N, d] -> [B, heads, N, d].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Coordinates(NamedTuple):
    """Time slot, row and column of tokens; integer tensors of one shape."""

    t: Tensor
    y: Tensor
    x: Tensor


def locate(index: Tensor, grid: Grid) -> Coordinates:
    """Where the tokens of these time-major indices stand in the grid (t, h, w)."""
    _, h, w = grid
    return Coordinates(index // (h * w), index // w % h, index % w)


class Pattern(ABC):
    """A function of query and key coordinates, true where the query attends to the key."""

    @abstractmethod
    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor: ...

    def __and__(self, other: "Pattern") -> "Pattern":
        return Both(self, other)

    def __or__(self, other: "Pattern") -> "Pattern":
        return Either(self, other)


@dataclass(frozen=True)
class Both(Pattern):
    first: Pattern
    second: Pattern

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return self.first(q, k) & self.second(q, k)


@dataclass(frozen=True)
class Either(Pattern):
    first: Pattern
    second: Pattern

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return self.first(q, k) | self.second(q, k)


@dataclass(frozen=True)
class TemporalWindow(Pattern):
    """Frames at most `radius` time slots away; 0 is the query's own frame."""

    radius: int

    def __post_init__(self) -> None:
        _whole(self, "radius", self.radius, least=0)

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return (q.t - k.t).abs() <= self.radius


@dataclass(frozen=True)
class TemporalStride(Pattern):
    """Every `stride`-th frame, counted from the query's."""

    stride: int

    def __post_init__(self) -> None:
        _whole(self, "stride", self.stride, least=1)

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return (q.t - k.t) % self.stride == 0


@dataclass(frozen=True)
class SpatialWindow(Pattern):
    """Rows and columns at most `radius` patches away, in every frame; 0 is the query's own place."""

    radius: int

    def __post_init__(self) -> None:
        _whole(self, "radius", self.radius, least=0)

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return ((q.y - k.y).abs() <= self.radius) & ((q.x - k.x).abs() <= self.radius)


@dataclass(frozen=True)
class SpatialStride(Pattern):
    """Every `stride`-th row and column, counted from the query's, in every frame."""

    stride: int

    def __post_init__(self) -> None:
        _whole(self, "stride", self.stride, least=1)

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return ((q.y - k.y) % self.stride == 0) & ((q.x - k.x) % self.stride == 0)


@dataclass(frozen=True)
class Window(Pattern):
    """The same window of a partition into windows of `size` (t, h, w), whose borders are moved by `shift`.

    Tokens before the first border and after the last form windows of their own, smaller ones. This is the partition of
    Swin's shifted windows (Liu et al. 2021, section 3.2), where the cyclic shift and its mask separate the same groups.
    """

    size: tuple[int, int, int]
    shift: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        sizes = list(self.size)
        if len(sizes) != 3 or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(f"window size {sizes}: give three whole numbers (frames, rows, columns), each at least 1")
        if len(self.shift) != 3 or any(not 0 <= s < n for s, n in zip(self.shift, self.size, strict=True)):
            raise ValueError(f"window shift {list(self.shift)}: each of the three from 0 to below the size {sizes}")

    def fitted(self, grid: Grid) -> "Window":
        """No larger than the grid, and not shifted along an axis that one window covers, as in Video Swin."""
        size = tuple(min(n, extent) for n, extent in zip(self.size, grid, strict=True))
        shift = tuple(0 if n >= extent else s for n, s, extent in zip(self.size, self.shift, grid, strict=True))
        return Window(size, shift)

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        same = torch.ones_like(q.t == k.t)
        for a, b, size, shift in zip(q, k, self.size, self.shift, strict=True):
            same = same & ((a + size - shift) // size == (b + size - shift) // size)
        return same


@dataclass(frozen=True)
class Lookback(Pattern):
    """The query's frame and earlier ones."""

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return k.t <= q.t


@dataclass(frozen=True)
class Lookahead(Pattern):
    """The query's frame and later ones."""

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return k.t >= q.t


_NAMED = (TemporalWindow, TemporalStride, SpatialWindow, SpatialStride, Window, Lookback, Lookahead)


def parse_pattern(text: str) -> Pattern:
    """A pattern from its text, e.g. "TemporalWindow(1) & SpatialStride(2) | SpatialWindow(0)"; & binds closer than |.

    Raises ValueError, with the names that exist, where the text is anything else.
    """
    known = {pattern.__name__: pattern for pattern in _NAMED}

    def build(node: ast.expr) -> Pattern:
        match node:
            case ast.BinOp(left, ast.BitAnd(), right):
                return build(left) & build(right)
            case ast.BinOp(left, ast.BitOr(), right):
                return build(left) | build(right)
            case ast.Call(ast.Name(name), arguments, []) if name in known:
                return known[name](*(ast.literal_eval(argument) for argument in arguments))
        raise ValueError(f"'{ast.unparse(node)}' is none of {', '.join(known)}, combined with & and |")

    try:
        return build(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"pattern '{text}': {error}") from error


def boolean_mask(heads: tuple[Pattern, ...], grid: Grid, keep: Tensor | None = None, device=None) -> Tensor:
    """Where queries attend to keys: bool [1 or B, len(heads), K, K], of all tokens or of `keep` [B, K].

    `heads` holds a pattern for each head, or one for all of them.
    """
    t, h, w = grid
    index = torch.arange(t * h * w, device=device)[None] if keep is None else keep
    q, k = locate(index[:, :, None], grid), locate(index[:, None, :], grid)
    allowed = {pattern: pattern(q, k) for pattern in dict.fromkeys(heads)}
    return torch.stack([allowed[pattern] for pattern in heads], dim=1)


@torch.compiler.disable
@functools.lru_cache(maxsize=32)
def block_mask(heads: tuple[Pattern, ...], grid: Grid, block_size: int, device: torch.device) -> BlockMask:
    """The mask of all tokens for FlexAttention, which skips blocks of `block_size` tokens without a true entry.

    It is made once for a grid, outside of a compiled graph: torch.compile would make it anew in every forward pass.
    """
    t, h, w = grid
    numbers = {pattern: number for number, pattern in enumerate(dict.fromkeys(heads))}
    number_of_head = torch.tensor([numbers[pattern] for pattern in heads], device=device)

    def allowed(b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        q, k = locate(i, grid), locate(j, grid)
        if len(numbers) == 1:
            return heads[0](q, k)
        results = [(number_of_head[head] == number) & pattern(q, k) for pattern, number in numbers.items()]
        return functools.reduce(torch.logical_or, results)

    n = t * h * w
    return create_block_mask(allowed, None, len(heads), n, n, device=device, BLOCK_SIZE=block_size)


# FlexAttention is fast only as a compiled kernel; nothing is compiled before the first call.
_flex_attention = torch.compile(flex_attention)


def attention_under(
    heads: tuple[Pattern, ...],
    grid: Grid,
    keep: Tensor | None,
    like: Tensor,
    head_dim: int,
    block_size: int = 128,
) -> Attend:
    """Attention under the patterns (one for each head, or one for all), on the device of `like`.

    All tokens on CUDA take FlexAttention's block-sparse kernel. Elsewhere scaled_dot_product_attention takes the same
    predicate as a mask: on the CPU FlexAttention has no backward pass. So do kept tokens, for which a block mask would
    have to be made anew at each step, and heads of less than 16 channels, for which the kernel is not made.
    """
    if keep is None and like.is_cuda and head_dim >= 16:
        return functools.partial(_flex_attention, block_mask=block_mask(heads, grid, block_size, like.device))
    return functools.partial(F.scaled_dot_product_attention, attn_mask=boolean_mask(heads, grid, keep, like.device))


class PatternAttention(Attention):
    """`Attention` whose heads are combined by `attend`; the same parameters."""

    def forward(
        self, x: Tensor, rope: RopeTables | None = None, attend: Attend = F.scaled_dot_product_attention
    ) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).unbind(2)
        if rope is not None:
            q, k = rotate(torch.stack([q, k], dim=2), rope).unbind(2)
        x = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, N, D)))


class PatternBlock(Block):
    """`Block` with PatternAttention: [B, N, D] -> [B, N, D]; the same parameters."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias=True, drop=drop, norm_layer=norm_layer)
        self.attn = PatternAttention(dim, num_heads, qkv_bias=True, proj_drop=drop)

    def forward(
        self, x: Tensor, rope: RopeTables | None = None, attend: Attend = F.scaled_dot_product_attention
    ) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, attend)
        return x + self.mlp(self.norm2(x))


def _whole(pattern: Pattern, name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{type(pattern).__name__}: {name} {value} must be a whole number, at least {least}")
