"""ViViT (Arnab et al. 2021, "ViViT: A Video Vision Transformer"): the four models of its section 3.3."""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tubelet.layers import Attention, Block
from tubelet.layers.groups import FoldedTokens, ScatteredTokens
from tubelet.layers.init import init_weights
from tubelet.layers.positions import Grid, LearnedPositions
from tubelet.models.inflatable import InflatableEncoder

Variant = Literal["spatio_temporal", "factorised_encoder", "factorised_self_attention", "factorised_dot_product"]


class FactorisedBlock(Block):
    """Attention over space, then over time, then the MLP: [B, N, D] -> [B, N, D]; paper, equations 4 to 6 (Model 3)."""

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


class DotProductBlock(Block):
    """One attention, half of its heads over space and half over time: [B, N, D] -> [B, N, D]; paper, Model 4."""

    def forward(self, x: Tensor, groups: FoldedTokens | ScatteredTokens) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
            (q, q_time), (k, k_time), (v, v_time) = (z.chunk(2, dim=1) for z in (q, k, v))
            space, time = groups.over_space(q, k, v, **options), groups.over_time(q_time, k_time, v_time, **options)
            return torch.cat([space.transpose(1, 2), time.transpose(1, 2)], dim=2).transpose(1, 2)

        return super().forward(x, None, attend)


class ViViT(InflatableEncoder):
    """Tokens of a clip through one of the paper's four models.

    `variant` "spatio_temporal" (Model 1): joint attention. "factorised_encoder" (2): `depth` blocks within each time
    slot, then `temporal_depth` blocks (4 if None) over the slots' CLS tokens. "factorised_self_attention" (3): in every
    block attention over space, then over time. "factorised_dot_product" (4): half of the heads over space, half over
    time. The head reads the CLS token (1, 2) or the mean of the tokens (3, 4, which have no CLS token).

    The paper uses Model 2 for classes alone. Its tokens here are the spatial encoder's plus the temporal encoder's
    output for their slot, so that they know of other times. Raises ValueError for sizes that do not fit.

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
            raise ValueError(f"variant '{variant}': take one of {', '.join(get_args(Variant))}")
        if variant == "factorised_dot_product" and num_heads % 2:
            raise ValueError(
                f"num_heads {num_heads}: factorised_dot_product gives half of the heads to space and half to time; "
                "take an even number"
            )
        if temporal_depth is not None and variant != "factorised_encoder":
            raise ValueError(
                f"temporal_depth {temporal_depth}: only factorised_encoder has a temporal encoder; remove it"
            )
        self.variant = variant
        sizes = {
            "dim": embed_dim,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "drop": drop_rate,
            "attn_drop": attn_drop_rate,
            "act_layer": act_layer,
            "norm_layer": norm_layer,
        }
        block = {
            "spatio_temporal": Block,
            "factorised_encoder": Block,
            "factorised_self_attention": FactorisedBlock,
            "factorised_dot_product": DotProductBlock,
        }[variant]
        has_temporal_encoder = variant == "factorised_encoder"
        t, h, w = self.grid
        self.positions = LearnedPositions(embed_dim, (1 if has_temporal_encoder else t, h, w), init_std)
        has_cls = variant in ("spatio_temporal", "factorised_encoder")
        self.cls_token = _token(embed_dim, init_std) if has_cls else None
        self.drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(block(**sizes) for _ in range(depth))
        self.norm = norm_layer(embed_dim)
        if has_temporal_encoder:
            self.temporal_cls_token = _token(embed_dim, init_std)
            self.temporal_positions = LearnedPositions(embed_dim, (t, 1, 1), init_std)
            self.temporal_blocks = nn.ModuleList(
                Block(**sizes) for _ in range(4 if temporal_depth is None else temporal_depth)
            )
            self.temporal_norm = norm_layer(embed_dim)
        init_weights(self, init_std)

    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        positions = self.positions(grid)
        x = self.patch_embed(video, keep) + (positions if keep is None else positions[keep])
        x, groups = self.drop(x), self.groups(keep, grid)
        if self.variant == "factorised_encoder":
            return self._attend_by_slot(x, groups)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = self.run(block, x) if self.variant == "spatio_temporal" else self.run(block, x, groups)
        x = self.norm(x)
        return (x, x.mean(1)) if self.cls_token is None else (x[:, 1:], x[:, 0])

    def _attend_by_slot(self, x: Tensor, groups: FoldedTokens | ScatteredTokens) -> tuple[Tensor, Tensor]:
        """The factorised encoder: embedded tokens [B, K, D] -> normed tokens [B, K, D] and the CLS token [B, D]."""
        x = groups.join(self.cls_token.expand(len(x), groups.t, -1), x)
        for block in self.blocks:
            x = self.run(block, x, None, groups.over_space)
        slots, x = groups.split(self.norm(x))
        slots = slots + self.temporal_positions((groups.t, 1, 1))
        slots = torch.cat([self.temporal_cls_token.expand(len(x), -1, -1), slots], dim=1)
        for block in self.temporal_blocks:
            slots = self.run(block, slots)
        slots = self.temporal_norm(slots)
        return x + groups.frame_of_each(slots[:, 1:]), slots[:, 0]

    def zero_init_temporal(self) -> None:
        if self.variant == "factorised_self_attention":
            for block in self.blocks:
                block.temporal_attn.proj.weight.zero_()
                block.temporal_attn.proj.bias.zero_()


def _token(dim: int, std: float) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=std))


SIZES = {
    "vivit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "vivit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "vivit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "vivit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
}

_vivit = partial(ViViT, norm_layer=partial(nn.LayerNorm, eps=1e-6))

# Each takes the keyword arguments of ViViT; what is given overrides the size.
vivit_tiny = partial(_vivit, **SIZES["vivit_tiny"])
vivit_small = partial(_vivit, **SIZES["vivit_small"])
vivit_base = partial(_vivit, **SIZES["vivit_base"])
vivit_large = partial(_vivit, **SIZES["vivit_large"])
