"""Sin-cos and learned position embeddings of tokens in a grid (t, h, w), which are in time-major order."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tubelet.grid import Grid
from tubelet.layers.checks import head_width
from tubelet.layers.coordinates import grid_coordinates
from tubelet.layers.rope import RopePairing, RopeTables, rope_tables


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
    _, y, x = grid_coordinates(grid)
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
    t, y, x = grid_coordinates(grid)
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

    def rope(self, indices: torch.Tensor | None = None, grid: Grid | None = None) -> RopeTables | None:
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
