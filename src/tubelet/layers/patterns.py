"""Attention patterns: predicates on query and key coordinates (t, y, x) that compose with & and |.

Under every pattern, and therefore under every composition, a token attends to itself. Thus every query has a key,
whichever tokens are kept.
"""

import ast
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from tubelet.grid import Grid
from tubelet.layers.coordinates import Coordinates


class Pattern(ABC):
    """Predicate of query and key coordinates that is True where the query attends to the key."""

    @abstractmethod
    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor: ...

    def __and__(self, other: "Pattern") -> "Pattern":
        return Both(self, other)

    def __or__(self, other: "Pattern") -> "Pattern":
        return Either(self, other)


@dataclass(frozen=True)
class Both(Pattern):
    """Conjunction of two patterns."""

    first: Pattern
    second: Pattern

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return self.first(q, k) & self.second(q, k)


@dataclass(frozen=True)
class Either(Pattern):
    """Disjunction of two patterns."""

    first: Pattern
    second: Pattern

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return self.first(q, k) | self.second(q, k)


@dataclass(frozen=True)
class TemporalWindow(Pattern):
    """Frames at most `radius` temporal indices away; 0 is the frame of the query alone."""

    radius: int

    def __post_init__(self) -> None:
        _check_integer(self, "radius", self.radius, minimum=0)

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return (q.t - k.t).abs() <= self.radius


@dataclass(frozen=True)
class TemporalStride(Pattern):
    """Every `stride`-th frame, counted from the frame of the query."""

    stride: int

    def __post_init__(self) -> None:
        _check_integer(self, "stride", self.stride, minimum=1)

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return (q.t - k.t) % self.stride == 0


@dataclass(frozen=True)
class SpatialWindow(Pattern):
    """Rows and columns at most `radius` patches away, in all frames; 0 is the location of the query alone."""

    radius: int

    def __post_init__(self) -> None:
        _check_integer(self, "radius", self.radius, minimum=0)

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return ((q.y - k.y).abs() <= self.radius) & ((q.x - k.x).abs() <= self.radius)


@dataclass(frozen=True)
class SpatialStride(Pattern):
    """Every `stride`-th row and column, counted from the location of the query, in all frames."""

    stride: int

    def __post_init__(self) -> None:
        _check_integer(self, "stride", self.stride, minimum=1)

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return ((q.y - k.y) % self.stride == 0) & ((q.x - k.x) % self.stride == 0)


@dataclass(frozen=True)
class Window(Pattern):
    """The window of the query in a partition of the grid into windows.

    Tokens before the first and after the last border form smaller windows. This is the partition of Swin's shifted
    windows (Liu et al. 2021, section 3.2), which implements it with a cyclic shift and a mask.

    Args:
        size: Size (t, h, w) of a window in tokens.
        shift: Offset (t, h, w) of the window borders in tokens.
    """

    size: tuple[int, int, int]
    shift: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        for name in ("size", "shift"):  # YAML gives lists, which are not hashable
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = list(self.size)
        if len(sizes) != 3 or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(f"window size {sizes}: expected three integers (frames, rows, columns), each at least 1")
        if len(self.shift) != 3 or any(not 0 <= s < n for s, n in zip(self.shift, self.size, strict=True)):
            raise ValueError(
                f"window shift {list(self.shift)}: expected three integers from 0 to less than the size {sizes}"
            )

    def fitted(self, grid: Grid) -> "Window":
        """Return a window that is no larger than the grid, as in Video Swin.

        Along an axis that a single window covers it is not shifted.
        """
        t, h, w = (min(n, extent) for n, extent in zip(self.size, grid, strict=True))
        dt, dh, dw = (0 if n >= extent else s for n, s, extent in zip(self.size, self.shift, grid, strict=True))
        return Window((t, h, w), (dt, dh, dw))

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        same = torch.ones_like(q.t == k.t)
        for a, b, size, shift in zip(q, k, self.size, self.shift, strict=True):
            same = same & ((a + size - shift) // size == (b + size - shift) // size)
        return same


@dataclass(frozen=True)
class Lookback(Pattern):
    """The frame of the query and earlier frames."""

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return k.t <= q.t


@dataclass(frozen=True)
class Lookahead(Pattern):
    """The frame of the query and later frames."""

    def __call__(self, q: Coordinates, k: Coordinates) -> Tensor:
        return k.t >= q.t


_NAMED = (TemporalWindow, TemporalStride, SpatialWindow, SpatialStride, Window, Lookback, Lookahead)


def parse_pattern(text: str) -> Pattern:
    """Parse a pattern expression such as "TemporalWindow(1) & SpatialStride(2) | SpatialWindow(0)".

    As in Python, & takes precedence over |.

    Raises:
        ValueError: If the text is not a combination of known patterns.
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
        raise ValueError(f"'{ast.unparse(node)}' is not one of {', '.join(known)}, combined with & and |")

    try:
        return build(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"pattern '{text}': {error}") from error


def _check_integer(pattern: Pattern, name: str, value: int, minimum: int) -> None:
    if not isinstance(value, int) or value < minimum:
        raise ValueError(f"{type(pattern).__name__}: {name} {value} must be an integer, at least {minimum}")
