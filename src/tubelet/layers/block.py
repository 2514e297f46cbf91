"""Pre-norm transformer blocks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tubelet.layers.attention import Attention, AttentionFn, CrossAttention
from tubelet.layers.mlp import MLP, SwiGLU
from tubelet.layers.rope import RopeTables


class BlockLayers(nn.Module):
    """Layers `norm1`, `attn`, `norm2` and `mlp` of a pre-norm block. Subclasses implement `forward`.

    Args:
        dim: Width D of the tokens.
        num_heads: Number of attention heads; must divide `dim`.
        mlp_ratio: Hidden width of the feed-forward layer divided by `dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        qk_scale: Factor of the attention logits; 1 / sqrt(head_dim) if None.
        drop: Dropout probability after the attention projection and in the feed-forward layer.
        attn_drop: Dropout probability of the attention weights.
        act_layer: Factory of the activation of the MLP.
        norm_layer: Factory of the normalization layers, called with `dim`.
        use_silu: Use a SwiGLU feed-forward layer instead of an MLP.
        wide_silu: Reduce the hidden width of SwiGLU to 2/3, so that it costs as much as the MLP.
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
        self.mlp: MLP | SwiGLU
        if use_silu:
            self.mlp = SwiGLU(dim, hidden, wide_silu=wide_silu, drop=drop)
        else:
            self.mlp = MLP(dim, hidden, act_layer=act_layer, drop=drop)


class Block(BlockLayers):
    """Pre-norm transformer block: x + attn(norm1(x)), then x + mlp(norm2(x)); [B, N, D] -> [B, N, D].

    The arguments are those of `BlockLayers`.
    """

    def forward(
        self, x: torch.Tensor, rope: RopeTables | None = None, attend: AttentionFn = F.scaled_dot_product_attention
    ) -> torch.Tensor:
        """Apply the block; `rope` and `attend` are passed to `Attention`."""
        x = x + self.attn(self.norm1(x), rope, attend)
        return x + self.mlp(self.norm2(x))


class CrossAttentionBlock(nn.Module):
    """Transformer block in which queries [B, n, D] attend to tokens [B, N, D] -> [B, n, D].

    As in V-JEPA, only the tokens are normalized before attention, not the queries.

    Args:
        dim: Width D of queries and tokens.
        num_heads: Number of attention heads; must divide `dim`.
        mlp_ratio: Hidden width of the MLP divided by `dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        act_layer: Factory of the activation of the MLP.
        norm_layer: Factory of the normalization layers, called with `dim`.
        use_proj: Apply an output projection after the attention.
    """

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


def run_block(block: nn.Module, *inputs: Any, use_checkpoint: bool) -> torch.Tensor:
    """Call `block(*inputs)`, with activation checkpointing if `use_checkpoint`.

    A checkpointed block does not store its activations; the backward pass recomputes them.
    """
    return checkpoint(block, *inputs, use_reentrant=False) if use_checkpoint else block(*inputs)
