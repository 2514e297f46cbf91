"""FastTimeSformer: space-time attention that is linear in the number of tokens.

Where the implementation published under this name departs from the Fastformer and Performer papers, this one follows
the papers: the published Performer computes random features without using them, and the published Fastformer sums the
global key over the channels instead of the tokens.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tubelet.grid import Grid, as_pair
from tubelet.layers import MLP
from tubelet.layers.coordinates import locate
from tubelet.layers.groups import Groups, tube_grid
from tubelet.layers.init import init_weights
from tubelet.layers.mixing import MECHANISMS, FastAttention, PerformerAttention, RegularAttention
from tubelet.layers.patch_embed import ClipEmbed
from tubelet.layers.rope import RopeTables, axial_rope
from tubelet.models.video_encoder import VideoEncoder

__all__ = ["FastAttention", "FastTimeSformer", "PerformerAttention", "RegularAttention"]

Mechanism = Literal["fastformer", "performer", "regular"]
AttentionType = Literal["divided", "joint"]
Layout = list[tuple[RopeTables | None, Groups | None]]


class SpaceTimeBlock(nn.Module):
    """Pre-norm block with several attention layers in sequence, then an MLP: [B, N, D] -> [B, N, D].

    Args:
        embed_dim: Width D of the tokens.
        attentions: Attention layers, each called with tokens, rotary tables and groups.
        mlp_ratio: Hidden width of the MLP divided by `embed_dim`.
        drop_rate: Dropout probability in the MLP.
    """

    def __init__(self, embed_dim: int, attentions: Sequence[nn.Module], mlp_ratio: float, drop_rate: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dim, eps=1e-6) for _ in attentions)
        self.attentions = nn.ModuleList(attentions)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio), drop=drop_rate)

    def forward(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Apply the block; `layout` holds the rotary tables and groups of each attention layer (None for none)."""
        for norm, attention, (rope, groups) in zip(self.norms, self.attentions, layout, strict=True):
            x = x + attention(norm(x), rope, groups)
        return x + self.mlp(self.norm(x))


class FastTimeSformer(VideoEncoder):
    """TimeSformer with a choice of attention mechanisms.

    Positions are rotary: over time and axially over space for divided attention, over all three axes for joint
    attention. Clips of any size that patches and tubelets divide work without interpolation. The head reads the mean
    token; the published model has a CLS token instead, which has no position in the grid.

    Clips have the shape [B, C, T, H, W] or [B, T, C, H, W]. The dimension of size `in_chans` determines which; if both
    match, it is [B, C, T, H, W].

    Args:
        num_frames: Frames per clip.
        in_chans: Channels of the video.
        height: Frame height in pixels; ignored if `img_size` is given.
        width: Frame width in pixels; ignored if `img_size` is given.
        num_classes: Classes of a linear head; 0 for no head, so that the encoder returns tokens.
        embed_dim: Width D of the tokens.
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per token.
        depth: Number of transformer blocks.
        num_heads: Attention heads per block; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLP divided by `embed_dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        drop_rate: Dropout probability after attention projections and in MLPs.
        attn_drop_rate: Dropout probability of the attention weights; only for `regular`.
        attn_mechanism: Token mixing: `fastformer` or `performer` (linear cost), or `regular` softmax attention.
        attn_type: `divided` attends over time, then over space; `joint` over all tokens.
        num_features: Random features of `performer`; d ln d for heads of d channels if None.
        init_std: Standard deviation of the initial weights (truncated normal).
        img_size: Frame size in pixels, the side of a square or (height, width), instead of `height` and `width`.
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If sizes are incompatible, or an option does not apply to the attention mechanism.

    Example:
        >>> model = FastTimeSformer(5, 3, 64, 64, num_classes=2, attn_mechanism="fastformer")
        >>> model(torch.randn(4, 5, 3, 64, 64)).shape, model.forward_features(torch.randn(4, 3, 5, 64, 64)).shape
        (torch.Size([4, 2]), torch.Size([4, 80, 128]))
    """

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
        attn_mechanism: Mechanism = "fastformer",
        attn_type: AttentionType = "divided",
        num_features: int | None = None,
        init_std: float = 0.02,
        img_size: int | tuple[int, int] | None = None,
        use_activation_checkpointing: bool = False,
    ):
        if img_size is not None:
            height, width = as_pair(img_size)
        super().__init__(
            (height, width),
            patch_size,
            num_frames,
            tubelet_size,
            embed_dim,
            num_heads,
            num_classes,
            use_activation_checkpointing,
        )
        self.attn_type = attn_type
        if attn_type not in get_args(AttentionType):
            raise ValueError(f"attn_type '{attn_type}': expected one of {', '.join(get_args(AttentionType))}")
        minimum = 4 if attn_type == "divided" else 6
        if self.head_dim % 2 or self.head_dim < minimum:
            raise ValueError(
                f"rotary positions of {attn_type} attention need an even number of channels per head, "
                f"at least {minimum}, not {embed_dim} / {num_heads}; change num_heads"
            )
        self.patch_embed = ClipEmbed(patch_size, tubelet_size, in_chans, embed_dim)
        attention = _attention(attn_mechanism, attn_drop_rate, num_features)
        attentions_per_block = 2 if attn_type == "divided" else 1
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(
                embed_dim,
                [attention(embed_dim, num_heads, qkv_bias, drop_rate) for _ in range(attentions_per_block)],
                mlp_ratio,
                drop_rate,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        init_weights(self, init_std)

    def redraw_features(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features in every Performer layer.

        Raises:
            ValueError: If `attn_mechanism` is not `performer`.
        """
        layers = [layer for layer in self.modules() if isinstance(layer, PerformerAttention)]
        if not layers:
            raise ValueError("redraw_features: only attn_mechanism performer has random features")
        for layer in layers:
            layer.redraw_features(generator)

    def channels_first(self, video: Tensor) -> Tensor:
        return self.patch_embed.channels_first(video)

    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        x = self.patch_embed(video, keep)
        layout = self._layout(grid, keep, x.device)
        for block in self.blocks:
            x = self.run(block, x, layout)
        x = self.norm(x)
        return x, x.mean(1)

    def _layout(self, grid: Grid, keep: Tensor | None, device: torch.device) -> Layout:
        """Return rotary tables and groups for each attention layer of a block."""
        index = torch.arange(math.prod(grid), device=device)[None] if keep is None else keep
        t, y, x = locate(index, grid)
        if self.attn_type == "joint":
            return [(axial_rope(self.head_dim, (t, y, x)), None)]
        if keep is not None and self.tube_masks:
            grid, keep = tube_grid(keep, grid), None
        return [
            (axial_rope(self.head_dim, (t,)), Groups(grid, "time", keep)),
            (axial_rope(self.head_dim, (y, x)), Groups(grid, "space", keep)),
        ]


def _attention(mechanism: str, attn_drop_rate: float, num_features: int | None) -> Callable[..., nn.Module]:
    """Return the factory of the mixing layer of this name, with its specific options bound."""
    if mechanism not in MECHANISMS:
        raise ValueError(f"attn_mechanism '{mechanism}': expected one of {', '.join(MECHANISMS)}")
    if attn_drop_rate and mechanism != "regular":
        raise ValueError(
            f"attn_drop_rate {attn_drop_rate}: {mechanism} has no attention weights to drop; use drop_rate instead"
        )
    if num_features is not None and mechanism != "performer":
        raise ValueError(f"num_features {num_features}: {mechanism} has no random features; remove it")
    options: dict[str, dict[str, Any]] = {
        "regular": {"attn_drop": attn_drop_rate},
        "performer": {"num_features": num_features},
        "fastformer": {},
    }
    return partial(MECHANISMS[mechanism], **options[mechanism])


SIZES: dict[str, dict[str, Any]] = {
    "fast_timesformer_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "fast_timesformer_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "fast_timesformer_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Factories accept all keyword arguments of FastTimeSformer, which override the preset.
fast_timesformer_tiny = partial(FastTimeSformer, **SIZES["fast_timesformer_tiny"])
fast_timesformer_small = partial(FastTimeSformer, **SIZES["fast_timesformer_small"])
fast_timesformer_base = partial(FastTimeSformer, **SIZES["fast_timesformer_base"])
