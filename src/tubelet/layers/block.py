"""Pre-norm transformer blocks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tubelet.layers.attention import Attend, Attention, CrossAttention
from tubelet.layers.mlp import MLP, SwiGLU
from tubelet.layers.positions import RopeTables


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x): [B, N, D] -> [B, N, D].

    `drop` acts on the outputs of attention and feed-forward layer, `attn_drop` on the attention weights.
    `use_silu` takes SwiGLU instead of the MLP. `attend` is that of Attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        use_silu: bool = False,
        wide_silu: bool = True,
    ):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.norm2 = norm_layer(dim)
        if use_silu:
            self.mlp = SwiGLU(dim, hidden, wide_silu=wide_silu, drop=drop)
        else:
            self.mlp = MLP(dim, hidden, act_layer=act_layer, drop=drop)

    def forward(
        self, x: torch.Tensor, rope: RopeTables | None = None, attend: Attend = F.scaled_dot_product_attention
    ) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), rope, attend)
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """Queries [B, n, D] read tokens [B, N, D] -> [B, n, D]; attention norms the tokens only, as in V-JEPA."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        use_proj: bool = True,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.xattn = CrossAttention(dim, num_heads, qkv_bias, use_proj)
        self.norm2 = norm_layer(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), act_layer=act_layer)

    def forward(self, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        q = q + self.xattn(q, self.norm1(x))
        return q + self.mlp(self.norm2(q))


def run_block(block: nn.Module, *inputs, save_memory: bool) -> torch.Tensor:
    """The block's output; with `save_memory` its activations are not kept but computed again in the backward pass."""
    return checkpoint(block, *inputs, use_reentrant=False) if save_memory else block(*inputs)
