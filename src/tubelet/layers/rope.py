"""Rotary positions (Su et al. 2021) of tokens in a grid (t, h, w)."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from tubelet.grid import Grid
from tubelet.layers.coordinates import grid_coordinates

RopePairing = Literal["interleaved", "vjepa2"]


class RopeTables(NamedTuple):
    """Coefficients of a linear map of channel pairs (a, b), written as complex numbers z = a + ib.

    The map is z * rotation + conj(z) * reflection. Both tables hold real and imaginary parts,
    [1 or B, N, 1, 1, pairs, 2]. A pure rotation has no reflection term.
    """

    rotation: torch.Tensor
    reflection: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RopeTables":
        """Apply a function to both tables."""
        return RopeTables(function(self.rotation), None if self.reflection is None else function(self.reflection))


def rope_tables(
    head_dim: int, grid: Grid, pairing: RopePairing = "interleaved", extent: int | None = None
) -> RopeTables:
    """Return `axial_rope` tables of all tokens of the grid, with a third of the channels for each axis.

    Args:
        head_dim: Channels per attention head.
        grid: Token grid (t, h, w).
        pairing: See `axial_rope`.
        extent: Spread rows and columns evenly over the positions 0 to extent - 1 of a grid of that side, whatever the
            size of the frames, as V-JEPA 2.1 does with 16. None: the positions are the numbers of rows and columns.

    Raises:
        ValueError: If `head_dim` is odd or less than 6, two channels per axis.
    """
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"rotary positions need an even number of channels per head, at least 6, not {head_dim}")
    t, y, x = (axis[None] for axis in grid_coordinates(grid))
    if extent is not None:
        y, x = (axis * ((extent - 1) / max(1, size - 1)) for axis, size in ((y, grid.h), (x, grid.w)))
    return axial_rope(head_dim, [t, y, x], pairing)


def axial_rope(head_dim: int, coordinates: Sequence[torch.Tensor], pairing: RopePairing = "interleaved") -> RopeTables:
    """Return rotary tables as in RoFormer (Su et al. 2021), equation 34, with equally many channels per axis.

    Channels 2i and 2i+1 form a pair. Channels that remain after an even split among the axes are not rotated.

    Args:
        head_dim: Channels per attention head.
        coordinates: For each axis the coordinates of the tokens [1 or B, N].
        pairing: `interleaved` gives both channels of a pair the same frequency, so that the pair is rotated. `vjepa2`
            concatenates the list of frequencies with itself instead, which is not a rotation, but is what the released
            weights of V-JEPA 2 were trained with.
    """
    dim = head_dim // len(coordinates) // 2 * 2
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=coordinates[0].device) / (dim // 2))
    angles = [axis[..., None] * omega for axis in coordinates]
    unrotated = (head_dim - len(coordinates) * dim) // 2
    if pairing == "interleaved":
        return RopeTables(_as_real(_phasors(angles, unrotated)))
    channel_angles = [torch.cat([angle, angle], dim=-1) for angle in angles]
    # A pair (a, b) becomes a cos - b sin of the first channel's angle, and a sin + b cos of the second's.
    first, second = (_phasors([angle[..., i::2] for angle in channel_angles], unrotated) for i in (0, 1))
    return RopeTables(_as_real((first + second) / 2), _as_real((first - second).conj() / 2))


def rotate(x: torch.Tensor, rope: RopeTables) -> torch.Tensor:
    """Apply rotary tables to stacked queries and keys x [B, N, 2, heads, head_dim].

    Computed in fp32 at least; the result has the dtype of `x`.
    """
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    rope = rope.map(lambda table: table.to(pairs.dtype))  # the model may have been cast to low precision
    # Complex numbers are fastest in eager mode; torch.compile fuses the real version into a single kernel.
    rotated = (_rotate_real if torch.compiler.is_compiling() else _rotate_complex)(pairs, rope)
    return rotated.flatten(-2).type_as(x)


def _rotate_complex(pairs: torch.Tensor, rope: RopeTables) -> torch.Tensor:
    z = torch.view_as_complex(pairs)
    rotated = z * torch.view_as_complex(rope.rotation)
    if rope.reflection is not None:
        rotated = torch.addcmul(rotated, z.conj(), torch.view_as_complex(rope.reflection))
    return torch.view_as_real(rotated)


def _rotate_real(pairs: torch.Tensor, rope: RopeTables) -> torch.Tensor:
    def product(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        real, imaginary = factor.unbind(-1)
        return torch.stack([a * real - b * imaginary, a * imaginary + b * real], dim=-1)

    a, b = pairs.unbind(-1)
    rotated = product(a, b, rope.rotation)
    return rotated if rope.reflection is None else rotated + product(a, -b, rope.reflection)


def _phasors(angles: list[torch.Tensor], unrotated: int) -> torch.Tensor:
    """Return exp(i * angle) for the angles of all axes, each [1 or B, N, pairs], followed by `unrotated` ones.

    Shape: [1 or B, N, 1, 1, all pairs].
    """
    angle = F.pad(torch.cat(angles, dim=-1), (0, unrotated))[..., None, None, :]
    return torch.polar(torch.ones_like(angle), angle)


def _as_real(z: torch.Tensor) -> torch.Tensor:
    """Return real and imaginary parts in a new last dimension, float32."""
    return torch.view_as_real(z.resolve_conj()).float()
