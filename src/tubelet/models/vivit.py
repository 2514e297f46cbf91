"""ViViT (Arnab et al. 2021, "ViViT: A Video Vision Transformer"): the four models of section 3.3."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tubelet.grid import Grid
from tubelet.layers import Attention, Block
from tubelet.layers.block import BlockLayers
from tubelet.layers.groups import FoldedTokens, ScatteredTokens
from tubelet.layers.init import init_weights
from tubelet.layers.positions import LearnedPositions
from tubelet.models.inflatable import InflatableEncoder

Variant = Literal["spatio_temporal", "factorised_encoder", "factorised_self_attention", "factorised_dot_product"]


class FactorisedBlock(BlockLayers):
    """Factorised self-attention (Model 3, equations 4 to 6): over space, then over time; [B, N, D] -> [B, N, D].

    The arguments are those of `BlockLayers`.
    """

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
        super().__init__(
            dim, num_heads, mlp_ratio, qkv_bias, None, drop, attn_drop, act_layer=act_layer, norm_layer=norm_layer
        )
        self.temporal_norm = norm_layer(dim)
        self.temporal_attn = Attention(dim, num_heads, qkv_bias, attn_drop=attn_drop, proj_drop=drop)

    def forward(self, x: Tensor, groups: FoldedTokens | ScatteredTokens) -> Tensor:
        x = x + self.attn(self.norm1(x), None, groups.over_space)
        x = x + self.temporal_attn(self.temporal_norm(x), None, groups.over_time)
        return x + self.mlp(self.norm2(x))


class DotProductBlock(BlockLayers):
    """Factorised dot-product attention (Model 4): half of the heads attend over space, the others over time.

    [B, N, D] -> [B, N, D]. The arguments are those of `BlockLayers`.
    """

    def forward(self, x: Tensor, groups: FoldedTokens | ScatteredTokens) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
            (q, q_time), (k, k_time), (v, v_time) = (z.chunk(2, dim=1) for z in (q, k, v))
            space, time = groups.over_space(q, k, v, **options), groups.over_time(q_time, k_time, v_time, **options)
            return torch.cat([space.transpose(1, 2), time.transpose(1, 2)], dim=2).transpose(1, 2)

        x = x + self.attn(self.norm1(x), None, attend)
        return x + self.mlp(self.norm2(x))


class ViViT(InflatableEncoder):
    """The four ViViT models.

    - Model 1, `spatio_temporal`: joint space-time attention.
    - Model 2, `factorised_encoder`: `depth` blocks within each temporal index, then `temporal_depth` blocks over the
      CLS tokens of the temporal indices.
    - Model 3, `factorised_self_attention`: every block attends over space, then over time.
    - Model 4, `factorised_dot_product`: half of the heads attend over space, half over time.

    The head reads the CLS token (Models 1 and 2) or the mean token (Models 3 and 4, which have no CLS token).

    The paper uses Model 2 only for classification. Here its tokens are those of the spatial encoder plus the output of
    the temporal encoder for their temporal index, so that they depend on all frames.

    Args:
        img_size: Frame size in pixels: the side of a square or (height, width).
        patch_size: Side of a patch in pixels.
        num_frames: Frames per clip.
        tubelet_size: Frames per token.
        in_chans: Channels of the video.
        num_classes: Classes of a linear head; 0 for no head, so that the encoder returns tokens.
        variant: Which of the four models to build, see above.
        embed_dim: Width D of the tokens.
        depth: Number of transformer blocks; of the spatial encoder in Model 2.
        temporal_depth: Blocks of the temporal encoder of `factorised_encoder`; 4 if None.
        num_heads: Attention heads per block; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLP divided by `embed_dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        drop_rate: Dropout probability after attention projections and in MLPs.
        attn_drop_rate: Dropout probability of the attention weights.
        act_layer: Factory of the activation of the MLPs.
        norm_layer: Factory of the normalization layers, called with `embed_dim`.
        init_std: Standard deviation of the initial weights (truncated normal).
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If sizes are incompatible, `variant` is unknown, or an option does not apply to the variant.

    Example:
        >>> encoder = ViViT(img_size=64, num_frames=8, embed_dim=192, num_heads=4, variant="factorised_dot_product")
        >>> clips = torch.randn(2, 3, 8, 64, 64)
        >>> encoder(clips).shape, encoder(clips, torch.tensor([[0, 5, 9], [1, 2, 3]])).shape
        (torch.Size([2, 64, 192]), torch.Size([2, 3, 192]))
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 32,
        tubelet_size: int = 2,
        in_chans: int = 3,
        num_classes: int = 0,
        variant: Variant = "spatio_temporal",
        embed_dim: int = 768,
        depth: int = 12,
        temporal_depth: int | None = None,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
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
        if variant not in get_args(Variant):
            raise ValueError(f"variant '{variant}': expected one of {', '.join(get_args(Variant))}")
        if variant == "factorised_dot_product" and num_heads % 2:
            raise ValueError(
                f"num_heads {num_heads}: factorised_dot_product splits the heads between space and time; "
                "use an even number"
            )
        if temporal_depth is not None and variant != "factorised_encoder":
            raise ValueError(
                f"temporal_depth {temporal_depth}: only factorised_encoder has a temporal encoder; remove it"
            )
        self.variant = variant
        block_options: dict[str, Any] = {
            "dim": embed_dim,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "drop": drop_rate,
            "attn_drop": attn_drop_rate,
            "act_layer": act_layer,
            "norm_layer": norm_layer,
        }
        block_type: type[BlockLayers] = {
            "spatio_temporal": Block,
            "factorised_encoder": Block,
            "factorised_self_attention": FactorisedBlock,
            "factorised_dot_product": DotProductBlock,
        }[variant]
        has_temporal_encoder = variant == "factorised_encoder"
        t, h, w = self.grid
        self.positions = LearnedPositions(embed_dim, Grid(1 if has_temporal_encoder else t, h, w), init_std)
        has_cls = variant in ("spatio_temporal", "factorised_encoder")
        self.cls_token = _token(embed_dim, init_std) if has_cls else None
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(block_type(**block_options) for _ in range(depth))
        self.norm = norm_layer(embed_dim)
        if has_temporal_encoder:
            self.temporal_cls_token = _token(embed_dim, init_std)
            self.temporal_positions = LearnedPositions(embed_dim, Grid(t, 1, 1), init_std)
            self.temporal_blocks = nn.ModuleList(
                Block(**block_options) for _ in range(4 if temporal_depth is None else temporal_depth)
            )
            self.temporal_norm = norm_layer(embed_dim)
        init_weights(self, init_std)

    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        positions = self.positions(grid)
        x = self.patch_embed(video, keep) + (positions if keep is None else positions[keep])
        x, groups = self.drop(x), self.groups(keep, grid)
        if self.variant == "factorised_encoder":
            return self._factorised_encoder(x, groups)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = self.run(block, x) if self.variant == "spatio_temporal" else self.run(block, x, groups)
        x = self.norm(x)
        return (x, x.mean(1)) if self.cls_token is None else (x[:, 1:], x[:, 0])

    def _factorised_encoder(self, x: Tensor, groups: FoldedTokens | ScatteredTokens) -> tuple[Tensor, Tensor]:
        """Apply Model 2: embedded tokens [B, K, D] -> normalized tokens [B, K, D] and CLS token [B, D]."""
        assert self.cls_token is not None
        x = groups.join(self.cls_token.expand(len(x), groups.t, -1), x)
        for block in self.blocks:
            x = self.run(block, x, None, groups.over_space)
        frame_cls, x = groups.split(self.norm(x))
        z = frame_cls + self.temporal_positions(Grid(groups.t, 1, 1))
        z = torch.cat([self.temporal_cls_token.expand(len(x), -1, -1), z], dim=1)
        for block in self.temporal_blocks:
            z = self.run(block, z)
        z = self.temporal_norm(z)
        return x + groups.expand_frames(z[:, 1:]), z[:, 0]

    def zero_init_temporal(self) -> None:
        for block in self.blocks:
            if isinstance(block, FactorisedBlock):
                nn.init.zeros_(block.temporal_attn.proj.weight)
                nn.init.zeros_(block.temporal_attn.proj.bias)


def _token(dim: int, std: float) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=std))


SIZES: dict[str, dict[str, Any]] = {
    "vivit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vivit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vivit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vivit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

_vivit = partial(ViViT, norm_layer=partial(nn.LayerNorm, eps=1e-6))

# Factories accept all keyword arguments of ViViT, which override the preset.
vivit_tiny = partial(_vivit, **SIZES["vivit_tiny"])
vivit_small = partial(_vivit, **SIZES["vivit_small"])
vivit_base = partial(_vivit, **SIZES["vivit_base"])
vivit_large = partial(_vivit, **SIZES["vivit_large"])
