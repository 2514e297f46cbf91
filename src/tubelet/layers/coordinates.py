"""Coordinates of the tokens of a grid (t, h, w), in time-major order: index = (t * h + y) * w + x."""

import math
from typing import NamedTuple

import torch

from tubelet.grid import Grid


class Coordinates(NamedTuple):
    """Temporal index, row and column of tokens: integer tensors of equal shape."""

    t: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor


def locate(index: torch.Tensor, grid: Grid) -> Coordinates:
    """Convert time-major token indices to grid coordinates."""
    _, h, w = grid
    return Coordinates(index // (h * w), index // w % h, index % w)


def grid_coordinates(grid: Grid) -> Coordinates:
    """Return the coordinates of all tokens of the grid, each [N]."""
    return locate(torch.arange(math.prod(grid), device="cpu"), grid)
