"""Multi-head self-attention and cross-attention on top of torch's scaled_dot_product_attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tubelet.layers.checks import head_width
from tubelet.layers.rope import RopeTables, rotate

AttentionFn = Callable[..., torch.Tensor]
"""A drop-in replacement for F.scaled_dot_product_attention.

It is called with queries, keys and values [B, num_heads, N, head_dim] and the keywords `dropout_p` and `scale`.
"""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attend: AttentionFn = F.scaled_dot_product_attention,
    **options: Any,
) -> torch.Tensor:
    """Call `attend(q, k, v, **options)`; on CPUs in fp32, also under autocast.

    The backward pass of torch's bf16 attention for CPUs takes three times as long as in fp32 for the 32 to 64 tokens of
    small clips, and as long for 800 tokens and more.
    """
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return attend(q, k, v, **options)
    with torch.autocast("cpu", enabled=False):
        return attend(q.float(), k.float(), v.float(), **options).to(v.dtype)


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, D] -> [B, N, D].

    Args:
        dim: Width D of the tokens.
        num_heads: Number of attention heads; must divide `dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        qk_scale: Factor of the attention logits; 1 / sqrt(head_dim) if None.
        attn_drop: Dropout probability of the attention weights.
        proj_drop: Dropout probability of the output.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width(dim, num_heads)
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, scale={self.scale:g}"

    def forward(
        self, x: torch.Tensor, rope: RopeTables | None = None, attend: AttentionFn = F.scaled_dot_product_attention
    ) -> torch.Tensor:
        """Mix the tokens.

        Args:
            x: Tokens [B, N, D].
            rope: Rotary tables of the N tokens, applied to queries and keys; no rotation if None.
            attend: Attention function; by default every token attends to all tokens.

        Returns:
            Tokens [B, N, D].
        """
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim)
        if rope is None:
            q, k, v = qkv.unbind(2)
        else:
            q, k = rotate(qkv[:, :, :2], rope).unbind(2)
            v = qkv[:, :, 2]
        x = attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attend,
            dropout_p=self.attn_drop if self.training else 0.0,
            scale=self.scale,
        )
        x = x.transpose(1, 2).reshape(B, N, D)
        return self.proj_drop(self.proj(x))


class CrossAttention(nn.Module):
    """Multi-head attention of queries [B, n, D] to tokens [B, N, D] -> [B, n, D].

    Args:
        dim: Width D of queries and tokens.
        num_heads: Number of attention heads; must divide `dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        use_proj: Apply an output projection. V-JEPA's released probes were trained without one.

    Raises:
        ValueError: If `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int = 12, qkv_bias: bool = False, use_proj: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width(dim, num_heads)
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim) if use_proj else nn.Identity()

    def forward(self, q: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        B, n, D = q.shape
        q = self.q(q).view(B, n, self.num_heads, self.head_dim)
        k, v = self.kv(x).view(B, x.shape[1], 2, self.num_heads, self.head_dim).unbind(2)
        y = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.proj(y.transpose(1, 2).reshape(B, n, D))
