"""Which tokens attend to which: predicates on (t, y, x) that compose with & and |.

Every pattern lets a token attend to itself, and so do all compositions: no query is ever left without a key, whichever
tokens are kept.
"""

import ast
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.layers.positions import Coordinates, Grid


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
        for name in ("size", "shift"):  # lists, as YAML has them, cannot be hashed
            object.__setattr__(self, name, tuple(getattr(self, name)))
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


def _whole(pattern: Pattern, name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{type(pattern).__name__}: {name} {value} must be a whole number, at least {least}")
