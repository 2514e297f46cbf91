"""The token grid and the kind of fixed sin-cos positions, read from their values."""

from typing import NamedTuple

import torch
from torch import Tensor

from tubelet.grid import Grid
from tubelet.layers.positions import sincos_2d, sincos_3d


class SinCos(NamedTuple):
    """Token grid (t, h, w) of positions, and how their channels are shared among the axes (of videos only)."""

    grid: Grid
    uniform_power: bool


def recognize(positions: Tensor, is_video: bool) -> SinCos | None:
    """Return the grid of sin-cos positions [1, N, D] and their kind; None if they are something else.

    The channels of an axis are equal where its coordinate is. So the first token with another row or time than token 0
    tells the number of columns or of tokens per time slot.
    """
    if positions.ndim != 3 or positions.shape[0] != 1:
        return None
    table = positions[0].float()
    count, width = table.shape
    if width % 4:
        return None
    if not is_video:
        columns = _first_change(table[:, : width // 2])  # rows are in the first half
        grid = Grid(1, count // columns, columns)
        expected = sincos_2d(width, grid)
        return SinCos(grid, False) if _close(table, expected) else None
    for uniform_power in (True, False):
        time = -(-width // 6) * 2 if uniform_power else width // 2
        space = time if uniform_power else width // 4
        slot = _first_change(table[:, :time])
        columns = _first_change(table[:slot, time : time + space])
        if count % slot or slot % columns or (not uniform_power and width % 8):
            continue
        grid = Grid(count // slot, slot // columns, columns)
        if _close(table, sincos_3d(width, grid, uniform_power)):
            return SinCos(grid, uniform_power)
    return None


def _first_change(rows: Tensor) -> int:
    """Return the index of the first row that differs from row 0; the number of rows if none does."""
    differs = (rows - rows[0]).abs().amax(1) > 1e-3
    return int(differs.int().argmax()) if differs.any() else len(rows)


def _close(table: Tensor, expected: Tensor) -> bool:
    return table.shape == expected.shape and torch.allclose(table, expected, atol=8e-3)  # may be stored in 16 bits
