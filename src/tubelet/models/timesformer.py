"""TimeSformer (Bertasius et al. 2021, "Is Space-Time Attention All You Need for Video Understanding?")."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tubelet.grid import Grid
from tubelet.layers import Attention, Block
from tubelet.layers.block import BlockLayers
from tubelet.layers.groups import FoldedTokens, ScatteredTokens
from tubelet.layers.init import init_weights
from tubelet.layers.positions import LearnedPositions
from tubelet.models.inflatable import InflatableEncoder

AttentionType = Literal["divided", "joint", "space_only"]


class DividedBlock(BlockLayers):
    """Divided space-time attention (section 3 of the paper): over time, then over space; [B, 1+N, D] -> [B, 1+N, D].

    The first token is the CLS token. It does not take part in temporal attention. In spatial attention every frame has
    a copy of it, and the outputs of the copies are averaged. As in the published code, a linear layer follows the
    temporal attention.

    Args:
        dim: Width D of the tokens.
        num_heads: Number of attention heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLP divided by `dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        drop: Dropout probability after attention projections and in the MLP.
        attn_drop: Dropout probability of the attention weights.
        norm_layer: Factory of the normalization layers, called with `dim`.
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
        super().__init__(dim, num_heads, mlp_ratio, qkv_bias, drop=drop, attn_drop=attn_drop, norm_layer=norm_layer)
        self.temporal_norm = norm_layer(dim)
        self.temporal_attn = Attention(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=drop)
        self.temporal_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, groups: FoldedTokens | ScatteredTokens) -> Tensor:
        cls, x = x[:, :1], x[:, 1:]
        x = x + self.temporal_proj(self.temporal_attn(self.temporal_norm(x), None, groups.over_time))
        y = groups.join(cls.expand(-1, groups.t, -1), x)
        copies, y = groups.split(self.attn(self.norm1(y), None, groups.over_space))
        x = torch.cat([cls + copies.mean(1, keepdim=True), x + y], dim=1)
        return x + self.mlp(self.norm2(x))


class TimeSformer(InflatableEncoder):
    """TimeSformer with divided, joint or space-only attention and learned position embeddings.

    The head reads the CLS token. With space-only attention there is one for each frame, and the head reads their mean.

    Args:
        img_size: Frame size in pixels: the side of a square or (height, width).
        patch_size: Side of a patch in pixels.
        num_frames: Frames per clip.
        tubelet_size: Frames per token; 1 in the paper.
        in_chans: Channels of the video.
        num_classes: Classes of a linear head; 0 for no head, so that the encoder returns tokens.
        attention_type: `divided` (over time, then over space), `joint` (over all tokens), or `space_only` (within each
            frame, without temporal positions).
        embed_dim: Width D of the tokens.
        depth: Number of transformer blocks.
        num_heads: Attention heads per block; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLP divided by `embed_dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        drop_rate: Dropout probability after attention projections and in MLPs.
        attn_drop_rate: Dropout probability of the attention weights.
        norm_layer: Factory of the normalization layers, called with `embed_dim`.
        init_std: Standard deviation of the initial weights (truncated normal).
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If sizes are incompatible or `attention_type` is unknown.

    Example:
        >>> encoder = TimeSformer(img_size=64, num_frames=8, embed_dim=192, num_heads=3)
        >>> clips = torch.randn(2, 3, 8, 64, 64)
        >>> encoder(clips).shape, encoder(clips, torch.tensor([[0, 5, 9], [1, 2, 3]])).shape
        (torch.Size([2, 128, 192]), torch.Size([2, 3, 192]))
    """

    cls_token: nn.Parameter

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
        block_types: dict[str, type[BlockLayers]] = {"divided": DividedBlock, "joint": Block, "space_only": Block}
        if attention_type not in block_types:
            raise ValueError(f"attention_type '{attention_type}': expected one of {', '.join(block_types)}")
        self.attention_type = attention_type
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        self.positions = LearnedPositions(embed_dim, self.grid._replace(t=1), init_std)
        if attention_type == "space_only":
            self.time_positions = None
        else:
            self.time_positions = LearnedPositions(embed_dim, Grid(self.grid.t, 1, 1), init_std)
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            block_types[attention_type](
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

    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        positions = self.positions(grid)
        if self.time_positions is not None:
            positions = positions + self.time_positions(grid)
        x = self.patch_embed(video, keep) + (positions if keep is None else positions[keep])
        return self._attend(self.drop(x), self.groups(keep, grid))

    def _attend(self, x: Tensor, groups: FoldedTokens | ScatteredTokens) -> tuple[Tensor, Tensor]:
        """Apply all blocks: embedded tokens [B, K, D] -> normalized tokens [B, K, D] and CLS token [B, D]."""
        if self.attention_type == "space_only":
            x = groups.join(self.cls_token.expand(len(x), groups.t, -1), x)
            for block in self.blocks:
                x = self.run(block, x, None, groups.over_space)
            frame_cls, x = groups.split(self.norm(x))
            return x, frame_cls.mean(1)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = self.run(block, x, groups) if self.attention_type == "divided" else self.run(block, x)
        x = self.norm(x)
        return x[:, 1:], x[:, 0]

    def zero_init_temporal(self) -> None:
        if self.time_positions is not None:
            self.time_positions.table.zero_()
        for block in self.blocks:
            if isinstance(block, DividedBlock):
                nn.init.zeros_(block.temporal_proj.weight)
                nn.init.zeros_(block.temporal_proj.bias)


SIZES: dict[str, dict[str, Any]] = {
    "timesformer_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "timesformer_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "timesformer_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "timesformer_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

_timesformer = partial(TimeSformer, norm_layer=partial(nn.LayerNorm, eps=1e-6))

# Factories accept all keyword arguments of TimeSformer, which override the preset.
timesformer_tiny = partial(_timesformer, **SIZES["timesformer_tiny"])
timesformer_small = partial(_timesformer, **SIZES["timesformer_small"])
timesformer_base = partial(_timesformer, **SIZES["timesformer_base"])
timesformer_large = partial(_timesformer, **SIZES["timesformer_large"])
