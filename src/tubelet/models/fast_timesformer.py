"""FastTimeSformer: space-time attention whose cost grows linearly with the number of tokens.

Three mechanisms mix tokens: `FastAttention` (Fastformer, Wu et al. 2021), `PerformerAttention` (FAVOR+, Choromanski et
al. 2021) and `RegularAttention` (softmax). They share one interface and can be used alone. Where the implementation
published under this name departs from the two papers, the papers are followed: its Performer computes the random
features and leaves them unused, and its Fastformer sums the global key over the channels instead of the tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from tubelet.layers import MLP, PatchEmbed3D
from tubelet.layers.checks import head_width
from tubelet.layers.init import init_weights
from tubelet.layers.positions import Grid, RopeTables, rotate

Axis = Literal["time", "space"]


@dataclass(frozen=True)
class Groups:
    """Which tokens of a grid attend to each other: along `time` those of one place, along `space` those of one frame.

    `keep` [B, K] are the indices of the tokens that exist, all if None. Groups of different sizes are filled up to the
    grid's size; `mask` tells the filled slots from the others. Only mixing sees the filled slots, no other layer does.
    """

    grid: Grid
    axis: Axis
    keep: torch.Tensor | None = None

    def num_tokens(self) -> int:
        """K, or N where all tokens exist."""
        return math.prod(self.grid) if self.keep is None else self.keep.shape[1]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N or K, heads, width] -> [groups, heads, tokens of a group, width]."""
        if self.keep is not None:
            empty = x.new_zeros(len(x), math.prod(self.grid), *x.shape[2:])
            x = empty.scatter(1, self.keep[..., None, None].expand_as(x), x)
        t, h, w = self.grid
        if self.axis == "time":
            return rearrange(x, "B (t h w) H d -> (B h w) H t d", t=t, h=h, w=w)
        return rearrange(x, "B (t h w) H d -> (B t) H (h w) d", t=t, h=h, w=w)

    def merge(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `split`."""
        t, h, w = self.grid
        if self.axis == "time":
            x = rearrange(x, "(B h w) H t d -> B (t h w) H d", h=h, w=w)
        else:
            x = rearrange(x, "(B t) H (h w) d -> B (t h w) H d", t=t, h=h, w=w)
        return x if self.keep is None else x.gather(1, self.keep[..., None, None].expand(-1, -1, *x.shape[2:]))

    def mask(self) -> torch.Tensor | None:
        """Bool [groups, 1, 1, tokens of a group], True where a token exists and throughout a group that has none."""
        if self.keep is None:
            return None
        ones = torch.ones(*self.keep.shape, 1, 1, device=self.keep.device)
        exists = self.split(ones).transpose(-1, -2) > 0
        return exists | ~exists.any(dim=-1, keepdim=True)


Layout = list[tuple[RopeTables | None, Groups | None]]


class _MixingLayer(nn.Module):
    """Tokens [B, N, D] -> [B, N, D]; `mix` is what the mechanisms differ in.

    Queries and keys are turned by `rope` where given. With `groups`, tokens are mixed within these groups.
    Raises ValueError when `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qkv_bias: bool,
        proj_drop: float,
        head_dim: int | None = None,
        parts: int = 3,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width(dim, num_heads) if head_dim is None else head_dim
        inner = self.num_heads * self.head_dim
        self.qkv = nn.Linear(dim, inner * parts, bias=qkv_bias)
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"

    def forward(self, x: torch.Tensor, rope: RopeTables | None = None, groups: Groups | None = None) -> torch.Tensor:
        q, k, v = self.project(x, rope)
        return self.proj_drop(self.proj(self.attend(q, k, v, groups)))

    def project(self, x: torch.Tensor, rope: RopeTables | None) -> Sequence[torch.Tensor]:
        """Queries, keys and values, each [B, N, heads, head width]."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        if rope is None:
            return qkv.unbind(2)
        return *rotate(qkv[:, :, :2], rope).unbind(2), qkv[:, :, 2]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups | None) -> torch.Tensor:
        """[B, N, heads * head width] from queries, keys and values [B, N, heads, head width]."""
        if groups is None:
            return self.mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None).transpose(1, 2).flatten(2)
        return groups.merge(self.mix(groups.split(q), groups.split(k), groups.split(v), groups.mask())).flatten(2)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """[G, heads, n, head width]; keys where `mask` [G, 1, 1, n] is False count for nothing."""
        raise NotImplementedError


class RegularAttention(_MixingLayer):
    """Softmax attention, quadratic in the number of tokens; `attn_drop` acts on its weights in training.

    Heads are `head_dim` wide, `dim / num_heads` if None.

    >>> RegularAttention(dim=64)(torch.randn(16, 32, 64)).shape
    torch.Size([16, 32, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        head_dim: int | None = None,
    ):
        super().__init__(dim, num_heads, qkv_bias, proj_drop, head_dim)
        self.attn_drop = attn_drop

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.attn_drop if self.training else 0.0
        )


class FastAttention(_MixingLayer):
    """Additive attention of Fastformer (Wu et al. 2021, "Additive Attention Can Be All You Need", section 3.1).

    In each head, over tokens i: the global query q = sum α_i q_i, with α the softmax of w_q·q_i / sqrt(d) (equations 3,
    4); p_i = q * k_i; the global key k = sum β_i p_i, with β the softmax of w_k·p_i / sqrt(d) (equations 5, 6); and
    u_i = k * v_i. The output is a linear map of u_i plus q_i. Values share the queries' weights, as in the paper.
    Rotary positions, which the paper has not, turn queries and keys wherever weights or sums are formed.

    >>> FastAttention(dim=64)(torch.randn(16, 32, 64)).shape
    torch.Size([16, 32, 64])
    """

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, proj_drop: float = 0.0):
        super().__init__(dim, num_heads, qkv_bias, proj_drop, parts=2)
        self.query_weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, 1, self.head_dim)))
        self.key_weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_heads, 1, self.head_dim)))

    def forward(self, x: torch.Tensor, rope: RopeTables | None = None, groups: Groups | None = None) -> torch.Tensor:
        q, k, v = self.project(x, rope)
        return self.proj_drop(self.proj(self.attend(q, k, v, groups)) + v.flatten(2))

    def project(self, x: torch.Tensor, rope: RopeTables | None) -> Sequence[torch.Tensor]:
        qk = self.qkv(x).unflatten(-1, (2, self.num_heads, self.head_dim))
        return *(qk if rope is None else rotate(qk, rope)).unbind(2), qk[:, :, 0]

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        # A sum weighted by a softmax of w·q_i / sqrt(d) is the attention of the one query w over the q_i. So is that of
        # the p_i = global_query * k_i, whose common factor goes to the query and the result instead.
        query_weight = self.query_weight.to(q.dtype).expand(len(q), -1, -1, -1)
        global_query = F.scaled_dot_product_attention(query_weight, q, q, attn_mask=mask)
        key_weight = self.key_weight.to(q.dtype) * global_query
        global_key = global_query * F.scaled_dot_product_attention(key_weight, k, k, attn_mask=mask)
        return global_key * v


class PerformerAttention(_MixingLayer):
    """Softmax attention approximated by FAVOR+ (Choromanski et al. 2021), linear in the number of tokens.

    The kernel exp(q·k / sqrt(d)) is the mean over random w of exp(w·q' - |q'|²/2) exp(w·k' - |k'|²/2), where
    q' = q / d^¼ and k' = k / d^¼ (lemma 1: positive features). The `num_features` vectors w, d ln d by default, are
    orthogonal in blocks of d (section 2.4) and saved with the weights; `redraw_features` draws others (section 4).

    Nothing is added to the features to keep them finite. Written with one softmax over the tokens and one over the
    features, the quotient of the paper's equation 4 can neither overflow nor divide by zero, and stays exact.

    >>> PerformerAttention(dim=64)(torch.randn(16, 32, 64)).shape
    torch.Size([16, 32, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        num_features: int | None = None,
    ):
        super().__init__(dim, num_heads, qkv_bias, proj_drop)
        if num_features is None:
            num_features = max(self.head_dim, int(self.head_dim * math.log(self.head_dim)))
        if num_features < 1:
            raise ValueError(f"num_features {num_features}: Performer needs at least one; leave it out for d ln d")
        self.register_buffer("features", _orthogonal_features(num_features, self.head_dim))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_features={len(self.features)}"

    @torch.no_grad()
    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, on the CPU, so that a seed gives the same ones on every device."""
        self.features.copy_(_orthogonal_features(*self.features.shape, generator))

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        scale = q.shape[-1] ** -0.5
        w = self.features.to(q.dtype) * scale**0.5
        # With s_fj = w_f·k'_j - |k'_j|²/2 and S_f = log sum_j exp s_fj, equation 4 reads
        # out_i = sum_f exp(w_f·q'_i + S_f) latent_f / sum_f exp(w_f·q'_i + S_f), latent_f = sum_j softmax_j(s_fj) v_j.
        # The factor exp(-|q'_i|²/2) cancels.
        s = w @ k.transpose(-1, -2) - (scale / 2) * k.square().sum(dim=-1)[..., None, :]
        if mask is not None:
            s = s.masked_fill(~mask, torch.finfo(s.dtype).min)
        latent = s.softmax(dim=-1) @ v
        return (q @ w.T + s.logsumexp(dim=-1)[..., None, :]).softmax(dim=-1) @ latent


class SpaceTimeBlock(nn.Module):
    """Tokens [B, N, D] -> [B, N, D]: each of the attentions in turn, then an MLP; all with pre-norm and residual.

    `layout` gives each attention its rotary tables and its groups, None where there are none.
    """

    def __init__(self, embed_dim: int, attentions: Sequence[nn.Module], mlp_ratio: float, drop_rate: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim, eps=1e-6) for _ in attentions)
        self.attentions = nn.ModuleList(attentions)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio), drop=drop_rate)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        for norm, attention, (rope, groups) in zip(self.norms, self.attentions, layout, strict=True):
            x = x + attention(norm(x), rope, groups)
        return x + self.mlp(self.norm(x))


class ClipEmbed(PatchEmbed3D):
    """Tokens of clips that may come with channels first, [B, C, T, H, W], or with frames first, [B, T, C, H, W].

    The axis that has as many entries as there are channels decides; where both have, channels come first.
    """

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        # The convolution leaves tokens far apart in memory, and each residual sum and norm would inherit that.
        return super().forward(x, keep).contiguous()

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along time, rows and columns of a clip; ValueError where patches or tubelets do not fill it."""
        tubelet_size, patch_size, _ = self.proj.kernel_size
        if min(num_frames, height, width) < 1 or height % patch_size or width % patch_size:
            raise ValueError(
                f"{height}x{width} pixels cannot be cut into patches of {patch_size}; "
                "crop to a multiple of the patch size"
            )
        if num_frames % tubelet_size:
            raise ValueError(
                f"{num_frames} frames cannot be cut into tubelets of {tubelet_size}; "
                "take a multiple of the tubelet size"
            )
        return num_frames // tubelet_size, height // patch_size, width // patch_size

    def frames_first(self, video: torch.Tensor) -> bool:
        """Whether frames come before channels; ValueError where neither axis holds the channels."""
        channels = self.proj.in_channels
        if video.ndim != 5 or channels not in video.shape[1:3]:
            raise ValueError(
                f"this encoder takes clips [B, {channels}, T, H, W] or [B, T, {channels}, H, W], not "
                f"{list(video.shape)}; set in_chans for another number of channels"
            )
        return video.shape[1] != channels

    def channels_first(self, video: torch.Tensor) -> torch.Tensor:
        """The clips as [B, C, T, H, W]."""
        return video.transpose(1, 2) if self.frames_first(video) else video


class FastTimeSformer(nn.Module):
    """TimeSformer with a choice of attention: `attn_mechanism` fastformer, performer or regular.

    With `attn_type` divided, blocks attend over time (the same place in all frames), then over space (one frame); with
    joint over all tokens together. Positions are rotary: over time and axial over space, or over all three axes where
    attention is joint; hence any length and size that the patches divide, without interpolation. `num_frames`, `height`
    and `width` are checked only; `img_size`, a side or (height, width), stands for the latter two. `num_features` are
    Performer's. The head of `num_classes` reads the mean token, which unlike the published CLS token needs no place
    beside the grid.

    Clips come as [B, C, T, H, W] or [B, T, C, H, W]. The axis that has `in_chans` entries holds the channels; where
    both have, channels first. Raises ValueError for sizes that do not fit.

    >>> model = FastTimeSformer(5, 3, 64, 64, num_classes=2, attn_mechanism="fastformer")
    >>> model(torch.randn(4, 5, 3, 64, 64)).shape, model.forward_features(torch.randn(4, 3, 5, 64, 64)).shape
    (torch.Size([4, 2]), torch.Size([4, 80, 128]))
    """

    accepts_masks = True

    def __init__(
        self,
        num_frames: int = 16,
        in_chans: int = 3,
        height: int = 224,
        width: int = 224,
        num_classes: int = 0,
        embed_dim: int = 128,
        patch_size: int = 16,
        tubelet_size: int = 1,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        attn_mechanism: str = "fastformer",
        attn_type: str = "divided",
        num_features: int | None = None,
        init_std: float = 0.02,
        img_size: int | tuple[int, int] | None = None,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_width(embed_dim, num_heads)
        self.attn_type = attn_type
        if attn_type not in ("divided", "joint"):
            raise ValueError(f"attn_type '{attn_type}': take divided or joint")
        least = 4 if attn_type == "divided" else 6
        if self.head_dim % 2 or self.head_dim < least:
            raise ValueError(
                f"rotary positions of {attn_type} attention need an even number of channels a head, at least {least}, "
                f"not {embed_dim} / {num_heads}; change num_heads"
            )
        if img_size is not None:
            height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.patch_embed = ClipEmbed(patch_size, tubelet_size, in_chans, embed_dim)
        self.grid_size(num_frames, height, width)

        attention = _attention(attn_mechanism, attn_drop_rate, num_features)
        per_block = 2 if attn_type == "divided" else 1
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(
                embed_dim,
                [attention(embed_dim, num_heads, qkv_bias, drop_rate) for _ in range(per_block)],
                mlp_ratio,
                drop_rate,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else None
        init_weights(self, init_std)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along time, rows and columns of a clip; ValueError where patches or tubelets do not fill it."""
        return self.patch_embed.grid_size(num_frames, height, width)

    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features in every layer; ValueError where the mechanism is not performer."""
        layers = [layer for layer in self.modules() if isinstance(layer, PerformerAttention)]
        if not layers:
            raise ValueError("redraw_features: only attn_mechanism performer has random features")
        for layer in layers:
            layer.redraw_features(generator)

    def forward(self, video: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None):
        """Clips -> logits [B, num_classes], or without a head the tokens of `forward_features`.

        With a head, `masks` [B, K] lets it read these tokens only, and a list of masks gives a list of logits.
        """
        if self.head is None:
            return self.forward_features(video, masks)
        if isinstance(masks, list):
            return [self.forward(video, mask) for mask in masks]
        return self.head(self.forward_features(video, masks).mean(dim=1))

    def forward_features(self, video: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None):
        """Clips -> tokens [B, N, D]; with `masks` [B, K] the kept ones [B, K, D], with a list of masks a list.

        Tokens that are not kept take no part: no other token depends on them.
        """
        if isinstance(masks, list):
            return [self.forward_features(video, mask) for mask in masks]
        video = self.patch_embed.channels_first(video)
        layout = self._layout(self.grid_size(*video.shape[2:]), masks, video.device)
        x = self.patch_embed(video, masks)
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x)

    def _layout(self, grid: Grid, keep: torch.Tensor | None, device: torch.device) -> Layout:
        """Rotary tables and groups for each attention of a block."""
        t, y, x = _coordinates(grid, keep, device)
        if self.attn_type == "joint":
            return [(_rotary_tables(self.head_dim, (t, y, x)), None)]
        return [
            (_rotary_tables(self.head_dim, (t,)), Groups(grid, "time", keep)),
            (_rotary_tables(self.head_dim, (y, x)), Groups(grid, "space", keep)),
        ]


MECHANISMS = {"fastformer": FastAttention, "performer": PerformerAttention, "regular": RegularAttention}


def _attention(mechanism: str, attn_drop_rate: float, num_features: int | None) -> Callable[..., nn.Module]:
    """The layer of this name with the options that it alone has."""
    if mechanism not in MECHANISMS:
        raise ValueError(f"attn_mechanism '{mechanism}': take one of {', '.join(MECHANISMS)}")
    if attn_drop_rate and mechanism != "regular":
        raise ValueError(
            f"attn_drop_rate {attn_drop_rate}: {mechanism} has no attention weights to drop; take drop_rate instead"
        )
    if num_features is not None and mechanism != "performer":
        raise ValueError(f"num_features {num_features}: {mechanism} has no random features; remove it")
    options = {"regular": {"attn_drop": attn_drop_rate}, "performer": {"num_features": num_features}, "fastformer": {}}
    return partial(MECHANISMS[mechanism], **options[mechanism])


def _orthogonal_features(num_features: int, dim: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Gaussian vectors [num_features, dim] that are orthogonal within each block of `dim`, with independent lengths."""
    blocks = math.ceil(num_features / dim)
    # On the CPU even while a model is built on the meta device.
    gaussians = torch.randn(blocks, dim, dim, generator=generator, device="cpu")
    q, r = torch.linalg.qr(gaussians)
    # Only with a positive diagonal of r is q uniform among the rotations (Mezzadri 2007).
    directions = (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).flatten(0, 1)[:num_features]
    lengths = torch.randn(num_features, dim, generator=generator, device="cpu").norm(dim=1, keepdim=True)
    return directions * lengths


def _coordinates(grid: Grid, keep: torch.Tensor | None, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Time, row and column of all tokens, each [1, N], or of those to keep, each [B, K]."""
    t, h, w = grid
    index = torch.arange(t * h * w, device=device)[None] if keep is None else keep
    return index // (h * w), index // w % h, index % w


def _rotary_tables(head_dim: int, coordinates: Sequence[torch.Tensor]) -> RopeTables:
    """Tables that turn an equal share of the channel pairs by each coordinate [1 or B, N]; pairs left over stay.

    RoFormer (Su et al. 2021), equation 34; with two coordinates the axial form.
    """
    dim = head_dim // len(coordinates) // 2 * 2
    omega = 10000.0 ** -(torch.arange(0, dim, 2, device=coordinates[0].device) / dim)
    angle = torch.cat([coordinate[..., None] * omega for coordinate in coordinates], dim=-1)
    angle = F.pad(angle, (0, head_dim // 2 - angle.shape[-1]))
    cos = repeat(angle.cos(), "B N pairs -> B N 1 1 (pairs two)", two=2)
    sin = rearrange([-angle.sin(), angle.sin()], "two B N pairs -> B N 1 1 (pairs two)")
    return RopeTables(cos, sin)


SIZES = {
    "fast_timesformer_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "fast_timesformer_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "fast_timesformer_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Each takes the keyword arguments of FastTimeSformer; what is given overrides the size.
fast_timesformer_tiny = partial(FastTimeSformer, **SIZES["fast_timesformer_tiny"])
fast_timesformer_small = partial(FastTimeSformer, **SIZES["fast_timesformer_small"])
fast_timesformer_base = partial(FastTimeSformer, **SIZES["fast_timesformer_base"])
