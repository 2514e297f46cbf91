"""TimeSformer (Bertasius et al. 2021, "Is Space-Time Attention All You Need for Video Understanding?").

Also here: what its kin share, that is attention within frames and within places, learned positions, and the frame of an
encoder that starts from an image ViT.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint

from tubelet.layers import MLP, Attention, Block, PatchEmbed3D
from tubelet.layers.checks import head_width
from tubelet.layers.init import init_weights
from tubelet.layers.positions import Grid

AttentionType = Literal["divided", "joint", "space_only"]
TubeletInit = Literal["central_frame", "filter_inflation"]
# Queries, keys, values [B, N, heads, width] and the dropout rate -> [B, N, heads, width].
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


class FullGrid:
    """Attention within frames and within places where all tokens are there: groups are folded into the batch.

    `join` puts a token of every frame, [B, t, D], before its patches; `over_space` then takes it along.
    """

    def __init__(self, grid: Grid):
        self.t, self.n = grid[0], grid[1] * grid[2]

    def over_space(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, drop: float) -> torch.Tensor:
        q, k, v = (rearrange(z, "B (t n) H d -> (B t) H n d", t=self.t) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        return rearrange(y, "(B t) H n d -> B (t n) H d", t=self.t)

    def over_time(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, drop: float) -> torch.Tensor:
        q, k, v = (rearrange(z, "B (t n) H d -> (B n) H t d", n=self.n) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop)
        return rearrange(y, "(B n) H t d -> B (t n) H d", n=self.n)

    def join(self, frames: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[B, t, D] and [B, t*n, D] -> [B, t*(1+n), D]."""
        return torch.cat([frames[:, :, None], x.unflatten(1, (self.t, self.n))], dim=2).flatten(1, 2)

    def split(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = y.unflatten(1, (self.t, 1 + self.n))
        return y[:, :, 0], y[:, :, 1:].flatten(1, 2)

    def frame_of_each(self, frames: torch.Tensor) -> torch.Tensor:
        """[B, t, D] -> [B, t*n, D]: for every token the entry of its frame."""
        return frames.repeat_interleave(self.n, dim=1)


class KeptTokens:
    """The same as FullGrid for the tokens `keep` [B, K] alone, any subset in any order: groups are ragged then, so
    attention runs over all kept tokens with those of other groups masked.

    The token of a frame stays where no patch of the frame is kept; it sees itself alone.
    """

    def __init__(self, keep: torch.Tensor, grid: Grid):
        self.t, n = grid[0], grid[1] * grid[2]
        self.frame = keep // n
        # `join` puts the tokens of the frames first.
        frame = torch.cat([torch.arange(self.t, device=keep.device).expand(len(keep), -1), self.frame], dim=1)
        self.same_frame = _equal_pairs(frame)
        self.same_place = _equal_pairs(keep % n)

    def over_space(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, drop: float) -> torch.Tensor:
        N = q.shape[1]  # K, or t + K with the tokens of the frames
        return _masked_attention(q, k, v, drop, self.same_frame[..., -N:, -N:])

    def over_time(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, drop: float) -> torch.Tensor:
        return _masked_attention(q, k, v, drop, self.same_place)

    def join(self, frames: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([frames, x], dim=1)

    def split(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return y[:, : self.t], y[:, self.t :]

    def frame_of_each(self, frames: torch.Tensor) -> torch.Tensor:
        return frames.gather(1, self.frame[..., None].expand(-1, -1, frames.shape[-1]))


class GroupAttention(Attention):
    """Multi-head self-attention [B, N, D] -> [B, N, D] in which `attend` says who sees whom."""

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).unbind(2)
        y = attend(q, k, v, self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(y.flatten(2)))


class GroupBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x), [B, N, D] -> [B, N, D], with `attend` as in GroupAttention."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = GroupAttention(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.norm2 = norm_layer(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


class DividedBlock(GroupBlock):
    """Attention over time, then over space: CLS token and patches [B, 1+N, D] -> [B, 1+N, D].

    Paper, section 3, "divided space-time attention", with the linear layer that its code puts after the temporal
    attention. The CLS token takes no part in the temporal attention; in the spatial one every frame has a copy of it,
    and the copies' results are averaged.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ):
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, drop, attn_drop, norm_layer=norm_layer)
        self.temporal_norm = norm_layer(dim)
        self.temporal_attn = GroupAttention(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.temporal_proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, where: FullGrid | KeptTokens) -> torch.Tensor:
        cls, x = x[:, :1], x[:, 1:]
        x = x + self.temporal_proj(self.temporal_attn(self.temporal_norm(x), where.over_time))
        y = where.join(cls.expand(-1, where.t, -1), x)
        copies, y = where.split(self.attn(self.norm1(y), where.over_space))
        x = torch.cat([cls + copies.mean(1, keepdim=True), x + y], dim=1)
        return x + self.mlp(self.norm2(x))


class LearnedPositions(nn.Module):
    """A learned embedding for every point of `grid` (t, h, w); an axis of size 1 holds for all times, rows or columns.

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
        table = self.table if size == self.grid else _interpolated(self.table, self.grid, size)
        return table.view(*size, -1).expand(*grid, -1).flatten(0, 2)


class SpaceTimeEncoder(nn.Module, ABC):
    """What TimeSformer and ViViT share: tubelets, grid, list of masks, classification head, start from an image ViT.

    A subclass has `blocks`, `norm`, `cls_token` (or None) and `positions`.
    """

    accepts_masks = True

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        in_chans: int,
        embed_dim: int,
        num_heads: int,
        num_classes: int,
        use_activation_checkpointing: bool,
    ):
        super().__init__()
        head_width(embed_dim, num_heads)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.use_activation_checkpointing = use_activation_checkpointing
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = self.grid_size(num_frames, height, width)
        self.patch_embed = PatchEmbed3D(patch_size, tubelet_size, in_chans, embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else None

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along time, rows and columns of a clip; ValueError where patches or tubelets do not fill it."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"{height}x{width} pixels cannot be cut into patches of {self.patch_size}; "
                "crop to a multiple of patch_size"
            )
        if num_frames % self.tubelet_size:
            raise ValueError(
                f"{num_frames} frames cannot be cut into tubelets of {self.tubelet_size}; "
                "take a multiple of tubelet_size (an image can be repeated)"
            )
        return num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size

    def forward(self, x: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None):
        """Clips [B, C, T, H, W] -> logits [B, num_classes], or without num_classes `forward_features`."""
        if self.head is None:
            return self.forward_features(x, masks)
        if isinstance(masks, list):
            return [self.forward(x, keep) for keep in masks]
        return self.head(self._encode_video(x, masks)[1])

    def forward_features(self, x: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None):
        """Clips [B, C, T, H, W] -> tokens [B, N, D] in time-major order, without CLS tokens.

        With `masks` [B, K], the indices of the tokens to keep, [B, K, D]: the others are never computed. With a list of
        masks, a list.
        """
        if isinstance(masks, list):
            return [self.forward_features(x, keep) for keep in masks]
        return self._encode_video(x, masks)[0]

    @torch.no_grad()
    def init_from_image_vit(self, image_vit: nn.Module, tubelet_init: TubeletInit = "central_frame") -> None:
        """Start as the image ViT of timm applied to frames; ViViT (Arnab et al. 2021), section 3.4.

        `tubelet_init` gives its patch embedding to the central frame of a tubelet, the others being zero (equation 9),
        or spreads it evenly over the frames ("filter inflation", equation 8). Positions in space are those of the
        image, interpolated if need be, the same at all times. Temporal attention that is a sub-layer of its own adds
        nothing at first: its last linear layer is zero. The head stays as it is. Raises ValueError for an image model
        of another size or kind.
        """
        if tubelet_init not in get_args(TubeletInit):
            raise ValueError(f"tubelet_init '{tubelet_init}': take one of {', '.join(get_args(TubeletInit))}")
        ours = (self.embed_dim, len(self.blocks), self.num_heads, self.patch_size)
        theirs = _image_vit_sizes(image_vit)
        if theirs != ours:
            raise ValueError(
                f"the image model's (width, depth, heads, patch size) are {theirs}, this encoder's {ours}; "
                "take an image ViT of the same size"
            )
        image = image_vit.patch_embed.proj
        kernel = self.patch_embed.proj.weight
        if tubelet_init == "filter_inflation":
            kernel.copy_(image.weight[:, :, None].expand_as(kernel) / self.tubelet_size)
        else:
            kernel.zero_()
            kernel[:, :, self.tubelet_size // 2] = image.weight
        self.patch_embed.proj.bias.copy_(image.bias)

        for block, source in zip(self.blocks, image_vit.blocks, strict=True):
            state = block.state_dict()
            state.update(source.state_dict())
            block.load_state_dict(state)
        self.norm.load_state_dict(image_vit.norm.state_dict())

        h, w = image_vit.patch_embed.grid_size
        position = image_vit.pos_embed[0]
        own_positions, of_patches = position[: -h * w], position[-h * w :]
        if self.cls_token is not None and image_vit.cls_token is not None:
            # Where the image model gives its CLS token a position, that is a sum of two constants.
            self.cls_token.copy_(image_vit.cls_token + own_positions.sum(0))
        table = _interpolated(of_patches, (1, h, w), (1, *self.positions.grid[1:]))
        self.positions.table.copy_(table.repeat(self.positions.grid[0], 1))
        self._silence_time()

    @abstractmethod
    def _encode(self, x: torch.Tensor, where: FullGrid | KeptTokens, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedded tokens [B, K, D] -> normed tokens [B, K, D] and what the head reads, [B, D]."""

    @abstractmethod
    def _silence_time(self) -> None:
        """Set to zero what an image model has no counterpart of, so that times do not mix at first."""

    def _encode_video(self, x: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        if x.ndim != 5:
            raise ValueError(
                f"this encoder takes clips [B, C, T, H, W], not {list(x.shape)}; repeat an image over the frames"
            )
        grid = self.grid_size(*x.shape[2:])
        where = FullGrid(grid) if keep is None else KeptTokens(keep, grid)
        positions = self._positions(grid)
        x = self.patch_embed(x, keep) + (positions if keep is None else positions[keep])
        return self._encode(x, where, grid)

    def _positions(self, grid: Grid) -> torch.Tensor:
        return self.positions(grid)

    def _run(self, blocks: nn.ModuleList, x: torch.Tensor, *how: Attend | FullGrid | KeptTokens) -> torch.Tensor:
        for block in blocks:
            if self.use_activation_checkpointing and self.training:
                x = checkpoint(block, x, *how, use_reentrant=False)
            else:
                x = block(x, *how)
        return x


class TimeSformer(SpaceTimeEncoder):
    """Tokens of a clip through `depth` blocks of divided, joint or space-only attention.

    `attention_type` "divided": over time, then over space; "joint": over all tokens; "space_only": over the frame's
    alone, without positions in time. A CLS token takes part (in "space_only" one for each frame) and is what the head
    reads, averaged over the frames. `tubelet_size` is 1 in the paper. Raises ValueError for sizes that do not fit.

    >>> encoder = TimeSformer(img_size=64, num_frames=8, embed_dim=192, num_heads=3)
    >>> clips = torch.randn(2, 3, 8, 64, 64)
    >>> encoder(clips).shape, encoder(clips, torch.tensor([[0, 5, 9], [1, 2, 3]])).shape
    (torch.Size([2, 128, 192]), torch.Size([2, 3, 192]))
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 8,
        tubelet_size: int = 1,
        in_chans: int = 3,
        num_classes: int = 0,
        attention_type: AttentionType = "divided",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float = 0.02,
        use_activation_checkpointing: bool = False,
    ):
        super().__init__(
            img_size,
            patch_size,
            num_frames,
            tubelet_size,
            in_chans,
            embed_dim,
            num_heads,
            num_classes,
            use_activation_checkpointing,
        )
        kinds = {"divided": DividedBlock, "joint": Block, "space_only": GroupBlock}
        if attention_type not in kinds:
            raise ValueError(f"attention_type '{attention_type}': take one of {', '.join(kinds)}")
        self.attention_type = attention_type
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        self.positions = LearnedPositions(embed_dim, (1, *self.grid[1:]), init_std)
        if attention_type == "space_only":
            self.time_positions = None
        else:
            self.time_positions = LearnedPositions(embed_dim, (self.grid[0], 1, 1), init_std)
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            kinds[attention_type](
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                norm_layer=norm_layer,
            )
            for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        init_weights(self, init_std)

    def _positions(self, grid: Grid) -> torch.Tensor:
        positions = self.positions(grid)
        return positions if self.time_positions is None else positions + self.time_positions(grid)

    def _encode(self, x: torch.Tensor, where: FullGrid | KeptTokens, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
        B = len(x)
        x = self.drop(x)
        if self.attention_type == "space_only":
            x = where.join(self.cls_token.expand(B, where.t, -1), x)
            frames, x = where.split(self.norm(self._run(self.blocks, x, where.over_space)))
            return x, frames.mean(1)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], dim=1)
        x = self._run(self.blocks, x, where) if self.attention_type == "divided" else self._run(self.blocks, x)
        x = self.norm(x)
        return x[:, 1:], x[:, 0]

    def _silence_time(self) -> None:
        if self.time_positions is not None:
            self.time_positions.table.zero_()
        for block in self.blocks:
            if self.attention_type == "divided":
                block.temporal_proj.weight.zero_()
                block.temporal_proj.bias.zero_()


def _equal_pairs(group: torch.Tensor) -> torch.Tensor:
    """[B, K] -> which tokens are of one group, [B, 1 for the heads, K, K]."""
    return group[:, None, :, None] == group[:, None, None, :]


def _masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, drop: float, allowed: torch.Tensor
) -> torch.Tensor:
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=drop).transpose(1, 2)


def _interpolated(table: torch.Tensor, old: Grid, new: Grid) -> torch.Tensor:
    """[t*h*w, D] of one grid -> [t*h*w, D] of another, trilinearly."""
    volume = rearrange(table, "(t h w) D -> 1 D t h w", t=old[0], h=old[1])
    return rearrange(F.interpolate(volume, size=new, mode="trilinear"), "1 D t h w -> (t h w) D")


def _image_vit_sizes(image_vit: nn.Module) -> tuple[int, int, int, int]:
    """Width, depth, heads and patch size; ValueError where it is not a plain ViT of timm."""
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    plain_block = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    if not hasattr(image_vit, "blocks") or set(image_vit.blocks[0].state_dict()) != plain_block:
        raise ValueError(
            "this is no plain image ViT of timm: its blocks must hold norms, attention and MLP alone; "
            "take one such as timm's vit_base_patch16_224"
        )
    if image_vit.num_prefix_tokens > 1 or list(image_vit.norm_pre.parameters()):
        raise ValueError("this image ViT has registers or a norm before its blocks; take one without")
    if not isinstance(image_vit.norm, nn.LayerNorm):
        raise ValueError("this image ViT has no norm before its pooling; build it with fc_norm=False")
    num_heads = image_vit.blocks[0].attn.num_heads
    return image_vit.embed_dim, len(image_vit.blocks), num_heads, image_vit.patch_embed.patch_size[0]


SIZES = {
    "timesformer_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "timesformer_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "timesformer_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "timesformer_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

_timesformer = partial(TimeSformer, norm_layer=partial(nn.LayerNorm, eps=1e-6))

# Each takes the keyword arguments of TimeSformer; what is given overrides the size.
timesformer_tiny = partial(_timesformer, **SIZES["timesformer_tiny"])
timesformer_small = partial(_timesformer, **SIZES["timesformer_small"])
timesformer_base = partial(_timesformer, **SIZES["timesformer_base"])
timesformer_large = partial(_timesformer, **SIZES["timesformer_large"])
