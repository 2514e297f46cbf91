"""Positions of tokens in a grid (t, h, w): sin-cos and learned position embeddings, rotary position tables.

Tokens are in time-major order: index = (t * h + y) * w + x.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tubelet.grid import Grid
from tubelet.layers.checks import head_width

RopePairing = Literal["interleaved", "vjepa2"]


class Coordinates(NamedTuple):
    """Temporal index, row and column of tokens: integer tensors of equal shape."""

    t: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor


def locate(index: torch.Tensor, grid: Grid) -> Coordinates:
    """Convert time-major token indices to grid coordinates."""
    _, h, w = grid
    return Coordinates(index // (h * w), index // w % h, index % w)


def sincos_2d(embed_dim: int, grid: Grid) -> torch.Tensor:
    """Return sin-cos position embeddings of an image as in MAE (He et al. 2022).

    The first half of the channels encodes the row, the second half the column.

    Args:
        embed_dim: Width D of the tokens.
        grid: Token grid (1, h, w).

    Returns:
        Embeddings [h*w, D], float32.

    Raises:
        ValueError: If `embed_dim` is not a multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"2D sin-cos positions need a width that is a multiple of 4, not {embed_dim}")
    _, y, x = _grid_coordinates(grid)
    return torch.cat([sincos_1d(embed_dim // 2, y), sincos_1d(embed_dim // 2, x)], dim=1).float()


def sincos_3d(embed_dim: int, grid: Grid, uniform_power: bool = False) -> torch.Tensor:
    """Return sin-cos position embeddings of a clip as in V-JEPA (Bardes et al. 2024).

    Args:
        embed_dim: Width D of the tokens.
        grid: Token grid (t, h, w).
        uniform_power: Give time, row and column a third of the channels each (rounded up, the last axis truncated).
            By default they get 1/2, 1/4 and 1/4.

    Returns:
        Embeddings [t*h*w, D], float32.

    Raises:
        ValueError: If `embed_dim` is not a multiple of 8, unless `uniform_power`.
    """
    if uniform_power:
        time_dim = space_dim = math.ceil(embed_dim / 6) * 2
    elif embed_dim % 8:
        raise ValueError(
            f"3D sin-cos positions need a width that is a multiple of 8, not {embed_dim}; or set uniform_power: true"
        )
    else:
        time_dim, space_dim = embed_dim // 2, embed_dim // 4
    t, y, x = _grid_coordinates(grid)
    parts = [sincos_1d(time_dim, t), sincos_1d(space_dim, y), sincos_1d(space_dim, x)]
    return torch.cat(parts, dim=1)[:, :embed_dim].float()


class Positions(nn.Module):
    """Fixed positions of the tokens of a grid: sin-cos embeddings or rotary tables.

    Both are determined by the configuration and therefore not part of the state dict.

    Args:
        embed_dim: Width of the tokens.
        num_heads: Number of attention heads; must divide `embed_dim`.
        grid: Token grid (t, h, w) of the configured clip size.
        is_video: Use 3D sin-cos embeddings; 2D ones for images otherwise.
        uniform_power: Give time, row and column equally many channels of the sin-cos embeddings.
        use_rope: Use rotary positions instead of sin-cos embeddings.
        rope_pairing: Frequencies of the rotary channel pairs, see `axial_rope`.
        rope_extent: Spread rows and columns of rotary positions over 0 to rope_extent - 1, see `rope_tables`.
    """

    pos_embed: torch.Tensor
    rotation: torch.Tensor
    reflection: torch.Tensor | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        grid: Grid,
        is_video: bool = True,
        uniform_power: bool = False,
        use_rope: bool = False,
        rope_pairing: RopePairing = "interleaved",
        rope_extent: int | None = None,
    ):
        super().__init__()
        self.grid = grid
        self.is_video = is_video
        self.head_dim = head_width(embed_dim, num_heads)
        self.uniform_power = uniform_power
        self.use_rope = use_rope
        self.rope_pairing = rope_pairing
        self.rope_extent = rope_extent
        if use_rope:
            for name, table in rope_tables(self.head_dim, grid, rope_pairing, rope_extent)._asdict().items():
                self.register_buffer(name, table, persistent=False)
        else:
            sincos = sincos_3d(embed_dim, grid, uniform_power) if is_video else sincos_2d(embed_dim, grid)
            self.register_buffer("pos_embed", sincos[None], persistent=False)

    def extra_repr(self) -> str:
        kind = f"rope, {self.rope_pairing}" if self.use_rope else f"sin-cos, uniform_power={self.uniform_power}"
        return f"{self.grid}, {kind}"

    def add(self, x: torch.Tensor, indices: torch.Tensor | None = None, grid: Grid | None = None) -> torch.Tensor:
        """Add position embeddings to tokens; rotary positions leave them unchanged.

        Args:
            x: Tokens [B, N, D], or [B, K, D] with `indices`.
            indices: Time-major indices [B, K] of the tokens in `x`; all N tokens in order if None.
            grid: Token grid of the clips; the configured one if None. For another grid the embeddings are interpolated
                as in V-JEPA, trilinearly for videos and bicubically for images.

        Returns:
            Tokens of the shape of `x`.
        """
        if self.use_rope:
            return x
        pos_embed = self.pos_embed if grid is None or grid == self.grid else self._interpolate(grid)
        return x + (pos_embed if indices is None else pos_embed[0, indices])

    def rope(self, indices: torch.Tensor | None = None, grid: Grid | None = None) -> "RopeTables | None":
        """Return the rotary tables of all tokens or of `indices` [B, K]; None for sin-cos positions."""
        if not self.use_rope:
            return None
        tables = RopeTables(self.rotation, self.reflection)
        if grid is not None and grid != self.grid:
            tables = rope_tables(self.head_dim, grid, self.rope_pairing, self.rope_extent)
            tables = tables.map(lambda table: table.to(self.rotation))
        return tables if indices is None else tables.map(lambda table: table[0, indices])

    def _interpolate(self, grid: Grid) -> torch.Tensor:
        volume = self.pos_embed.view(1, *self.grid, -1).permute(0, 4, 1, 2, 3)
        if self.is_video:
            volume = F.interpolate(volume, size=grid, mode="trilinear")
            return volume.flatten(2).transpose(1, 2)
        return F.interpolate(volume.squeeze(2), size=grid[1:], mode="bicubic").flatten(2).transpose(1, 2)


class LearnedPositions(nn.Module):
    """Learned position embeddings of a token grid.

    Args:
        dim: Width D of the embeddings.
        grid: Grid (t, h, w) of the table. An axis of size 1 shares one embedding among all times, rows or columns.
        std: Standard deviation of the initial embeddings (truncated normal).
    """

    def __init__(self, dim: int, grid: Grid, std: float = 0.02):
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(math.prod(grid), dim))
        nn.init.trunc_normal_(self.table, std=std)

    def extra_repr(self) -> str:
        return f"{self.grid}"

    def forward(self, grid: Grid) -> torch.Tensor:
        """Return embeddings [t*h*w, D] for clips of `grid`, interpolated trilinearly where the sizes differ."""
        size = Grid(*(1 if configured == 1 else actual for configured, actual in zip(self.grid, grid, strict=True)))
        table = self.table if size == self.grid else interpolate_positions(self.table, self.grid, size)
        return table.view(*size, -1).expand(*grid, -1).flatten(0, 2)


def interpolate_positions(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """Interpolate position embeddings [t*h*w, D] trilinearly from the grid `old` to the grid `new`."""
    volume = rearrange(table, "(t h w) D -> 1 D t h w", t=old[0], h=old[1])
    return rearrange(F.interpolate(volume, size=new, mode="trilinear"), "1 D t h w -> (t h w) D")


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
    t, y, x = (axis[None] for axis in _grid_coordinates(grid))
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


def _grid_coordinates(grid: Grid) -> Coordinates:
    """Return the coordinates of all tokens of the grid, each [N]."""
    return locate(torch.arange(math.prod(grid), device="cpu"), grid)


def _axis(size: int) -> torch.Tensor:
    """Return 0, 1, ..., size - 1 in float64.

    Always on the CPU: tables are not in checkpoints, so they must have values even if the model is built on the meta
    device.
    """
    return torch.arange(size, dtype=torch.float64, device="cpu")


def sincos_1d(dim: int, position: torch.Tensor) -> torch.Tensor:
    """Encode positions [N] as [N, dim]: sines, then cosines, of `dim / 2` frequencies from 1 down to about 1/10000."""
    omega = 10000.0 ** -(_axis(dim // 2) / (dim / 2))
    angle = position[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)
