"""Where tokens stand in a grid (t, h, w), in time-major order: sin-cos and learned embeddings, rotary tables."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tubelet.layers.checks import head_width

Grid = tuple[int, int, int]
RopePairing = Literal["interleaved", "vjepa2"]


class Coordinates(NamedTuple):
    """Time slot, row and column of tokens; integer tensors of one shape."""

    t: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor


def locate(index: torch.Tensor, grid: Grid) -> Coordinates:
    """Where the tokens of these time-major indices stand."""
    _, h, w = grid
    return Coordinates(index // (h * w), index // w % h, index % w)


def sincos_2d(embed_dim: int, grid: Grid) -> torch.Tensor:
    """[h*w, D] as in MAE: half of the channels encode the row, half the column. D must be a multiple of 4."""
    if embed_dim % 4:
        raise ValueError(f"sin-cos positions of images need a width that is a multiple of 4, not {embed_dim}")
    _, y, x = _all_places(grid)
    return torch.cat([_sincos_1d(embed_dim // 2, y), _sincos_1d(embed_dim // 2, x)], dim=1).float()


def sincos_3d(embed_dim: int, grid: Grid, uniform_power: bool = False) -> torch.Tensor:
    """[t*h*w, D] as in V-JEPA: channels for time, row, column.

    They get 1/2, 1/4, 1/4 of the channels (D a multiple of 8), or with `uniform_power` a third each, rounded up and the
    last cut short.
    """
    if uniform_power:
        time_dim = space_dim = math.ceil(embed_dim / 6) * 2
    elif embed_dim % 8:
        raise ValueError(
            f"sin-cos positions of videos need a width that is a multiple of 8, not {embed_dim}, unless uniform_power"
        )
    else:
        time_dim, space_dim = embed_dim // 2, embed_dim // 4
    t, y, x = _all_places(grid)
    parts = [_sincos_1d(time_dim, t), _sincos_1d(space_dim, y), _sincos_1d(space_dim, x)]
    return torch.cat(parts, dim=1)[:, :embed_dim].float()


class Positions(nn.Module):
    """Where the tokens of a grid stand: fixed sin-cos embeddings, or with `use_rope` rotary tables.

    Both follow from the configuration, so neither is part of the state dict.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        grid: Grid,
        is_video: bool = True,
        uniform_power: bool = False,
        use_rope: bool = False,
        rope_pairing: RopePairing = "interleaved",
    ):
        super().__init__()
        self.grid = grid
        self.is_video = is_video
        self.head_dim = head_width(embed_dim, num_heads)
        self.uniform_power = uniform_power
        self.use_rope = use_rope
        self.rope_pairing = rope_pairing
        if use_rope:
            for name, table in rope_tables(self.head_dim, grid, rope_pairing)._asdict().items():
                self.register_buffer(name, table, persistent=False)
        else:
            sincos = sincos_3d(embed_dim, grid, uniform_power) if is_video else sincos_2d(embed_dim, grid)
            self.register_buffer("pos_embed", sincos[None], persistent=False)

    def extra_repr(self) -> str:
        kind = f"rope, {self.rope_pairing}" if self.use_rope else f"sin-cos, uniform_power={self.uniform_power}"
        return f"{self.grid}, {kind}"

    def add(self, x: torch.Tensor, indices: torch.Tensor | None = None, grid: Grid | None = None) -> torch.Tensor:
        """Tokens x [B, N, D] plus their embeddings (nothing is added where positions are rotary).

        With `indices` [B, K], x [B, K, D] are these tokens. For a `grid` other than the configured one the embeddings
        are interpolated, trilinearly for videos and bicubically for images, as in V-JEPA.
        """
        if self.use_rope:
            return x
        pos_embed = self.pos_embed if grid in (None, self.grid) else self._interpolated(grid)
        return x + (pos_embed if indices is None else pos_embed[0, indices])

    def rope(self, indices: torch.Tensor | None = None, grid: Grid | None = None) -> "RopeTables | None":
        """The rotary tables of all tokens, or of `indices` [B, K]; None where positions are embeddings."""
        if not self.use_rope:
            return None
        tables = RopeTables(self.turn, self.mirror)
        if grid not in (None, self.grid):
            tables = rope_tables(self.head_dim, grid, self.rope_pairing).each(lambda table: table.to(self.turn))
        return tables if indices is None else tables.each(lambda table: table[0, indices])

    def _interpolated(self, grid: Grid) -> torch.Tensor:
        volume = self.pos_embed.view(1, *self.grid, -1).permute(0, 4, 1, 2, 3)
        if self.is_video:
            volume = F.interpolate(volume, size=grid, mode="trilinear")
            return volume.flatten(2).transpose(1, 2)
        return F.interpolate(volume.squeeze(2), size=grid[1:], mode="bicubic").flatten(2).transpose(1, 2)


class LearnedPositions(nn.Module):
    """A learned embedding for every point of `grid`; an axis of size 1 holds for all times, rows or columns.

    Called with the grid of a clip it gives [t*h*w, D], trilinearly interpolated where the sizes differ.
    """

    def __init__(self, dim: int, grid: Grid, std: float = 0.02):
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.empty(math.prod(grid), dim))
        nn.init.trunc_normal_(self.table, std=std)

    def extra_repr(self) -> str:
        return f"{self.grid}"

    def forward(self, grid: Grid) -> torch.Tensor:
        size = tuple(1 if own == 1 else new for own, new in zip(self.grid, grid, strict=True))
        table = self.table if size == self.grid else interpolated(self.table, self.grid, size)
        return table.view(*size, -1).expand(*grid, -1).flatten(0, 2)


def interpolated(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """[t*h*w, D] of one grid -> [t*h*w, D] of another, trilinearly."""
    volume = rearrange(table, "(t h w) D -> 1 D t h w", t=old[0], h=old[1])
    return rearrange(F.interpolate(volume, size=new, mode="trilinear"), "1 D t h w -> (t h w) D")


class RopeTables(NamedTuple):
    """What turns the channel pairs (a, b) of tokens, taken as complex numbers z = a + ib: z · turn + conj(z) · mirror.

    Real and imaginary parts, [1 or B, N, 1, 1, pairs, 2]. A rotation has no mirror.
    """

    turn: torch.Tensor
    mirror: torch.Tensor | None = None

    def each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "RopeTables":
        return RopeTables(function(self.turn), None if self.mirror is None else function(self.mirror))


def rope_tables(head_dim: int, grid: Grid, pairing: RopePairing = "interleaved") -> RopeTables:
    """`axial_rope` of all tokens of the grid; a third of the channels for each axis.

    Raises ValueError where a third has no pair or a channel no partner.
    """
    if head_dim < 6 or head_dim % 2:
        raise ValueError(f"rotary positions need an even number of channels a head, at least 6, not {head_dim}")
    return axial_rope(head_dim, [axis[None] for axis in _all_places(grid)], pairing)


def axial_rope(head_dim: int, coordinates: Sequence[torch.Tensor], pairing: RopePairing = "interleaved") -> RopeTables:
    """Rotary tables after RoFormer (Su et al. 2021), equation 34, with an equal share of the channels an axis.

    `coordinates` are of one axis or more, each [1 or B, N]. Channels 2i and 2i+1 form a pair. `interleaved` gives both
    the same frequency, which makes it a rotation; `vjepa2` repeats the whole list of frequencies instead, as the
    released weights of V-JEPA 2 expect. Channels beyond even shares stay as they are.
    """
    dim = head_dim // len(coordinates) // 2 * 2
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64, device=coordinates[0].device) / (dim // 2))
    angles = [axis[..., None] * omega for axis in coordinates]
    spare = (head_dim - len(coordinates) * dim) // 2
    if pairing == "interleaved":
        return RopeTables(_parts(_unit_numbers(angles, spare)))
    of_channels = [torch.cat([angle, angle], dim=-1) for angle in angles]
    # A pair (a, b) becomes a cos - b sin of the first channel's angle, and a sin + b cos of the second's.
    first, second = (_unit_numbers([angle[..., i::2] for angle in of_channels], spare) for i in (0, 1))
    return RopeTables(_parts((first + second) / 2), _parts((first - second).conj() / 2))


def rotate(x: torch.Tensor, rope: RopeTables) -> torch.Tensor:
    """Turn the channel pairs of x [B, N, 2, heads, width] by the tables' angles, in fp32; the result has x's type."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    rope = rope.each(lambda table: table.to(pairs.dtype))  # a model may have been cast as a whole
    # Complex numbers are the fastest as they stand; compiled, the real ones become a single kernel.
    turned = (_compiled_rotation if torch.compiler.is_compiling() else _complex_rotation)(pairs, rope)
    return turned.flatten(-2).type_as(x)


def _complex_rotation(pairs: torch.Tensor, rope: RopeTables) -> torch.Tensor:
    z = torch.view_as_complex(pairs)
    turned = z * torch.view_as_complex(rope.turn)
    if rope.mirror is not None:
        turned = torch.addcmul(turned, z.conj(), torch.view_as_complex(rope.mirror))
    return torch.view_as_real(turned)


def _compiled_rotation(pairs: torch.Tensor, rope: RopeTables) -> torch.Tensor:
    def product(a: torch.Tensor, b: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        real, imaginary = factor.unbind(-1)
        return torch.stack([a * real - b * imaginary, a * imaginary + b * real], dim=-1)

    a, b = pairs.unbind(-1)
    turned = product(a, b, rope.turn)
    return turned if rope.mirror is None else turned + product(a, -b, rope.mirror)


def _unit_numbers(angles: list[torch.Tensor], spare: int) -> torch.Tensor:
    """exp(i angle) of the pairs of each axis [1 or B, N, pairs], and `spare` ones, as [1 or B, N, 1, 1, all pairs]."""
    angle = F.pad(torch.cat(angles, dim=-1), (0, spare))[..., None, None, :]
    return torch.polar(torch.ones_like(angle), angle)


def _parts(z: torch.Tensor) -> torch.Tensor:
    """Real and imaginary part in a last axis, float32."""
    return torch.view_as_real(z.resolve_conj()).float()


def _all_places(grid: Grid) -> Coordinates:
    """Of every token, each [N]."""
    return locate(torch.arange(math.prod(grid), device="cpu"), grid)


def _axis(size: int) -> torch.Tensor:
    """0, 1, ... in float64; on the CPU even while a model is built on the meta device, since tables are in no file."""
    return torch.arange(size, dtype=torch.float64, device="cpu")


def _sincos_1d(dim: int, position: torch.Tensor) -> torch.Tensor:
    """[N] -> [N, dim]: sines, then cosines, of `dim / 2` frequencies from 1 down towards 1/10000."""
    omega = 10000.0 ** -(_axis(dim // 2) / (dim / 2))
    angle = position[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1)
