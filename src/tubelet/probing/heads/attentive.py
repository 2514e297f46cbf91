"""Attentive probe of V-JEPA: a learned query attends to all tokens, then a linear layer (Bardes et al. 2024)."""

import functools
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from tubelet.layers.block import CrossAttentionBlock
from tubelet.models.attentive_pooler import AttentiveClassifier, AttentivePooler
from tubelet.probing.heads import Head


class AttentiveHead(Head, AttentiveClassifier):
    """`AttentiveClassifier`, of which several share the work on the same tokens."""

    @staticmethod
    def forward_together(heads: Sequence[Head], tokens: Tensor) -> Tensor:
        members = cast(Sequence[AttentiveHead], heads)
        if all(_is_single_cross_attention(head.pooler) for head in members):
            pooled = pool_together([head.pooler for head in members], tokens)
            return torch.stack([head.linear(x[:, 0]) for head, x in zip(members, pooled, strict=True)])
        return Head.forward_together(heads, tokens)


attentive = functools.partial(AttentiveHead)


def pool_together(poolers: Sequence[AttentivePooler], tokens: Tensor) -> list[Tensor]:
    """The outputs [B, Q, D] of G one-block poolers on the same tokens [B, N, D], reading each token only once.

    The queries of a pooler are parameters, the same for all videos. So the key projection can be moved to their side,
    q·(W_k x) = (W_kᵀq)·x, and the value projection behind the weighted sum, Σ a (W_v x) = W_v Σ a x; likewise scale and
    shift of the norm before them. A bias of the keys adds the same to all logits of a query and cancels. For N tokens
    of dimension D and H heads this takes N·D·H multiplications instead of 2·N·D·D.
    """
    dim = tokens.shape[-1]
    _, norm = _block_and_norm(poolers[0])
    normalized = F.layer_norm(tokens, (dim,), eps=norm.eps)
    queries = torch.cat([_queries_before_keys(pooler) for pooler in poolers])
    attention = (queries @ normalized.mT).softmax(-1)
    sums = (attention @ normalized).chunk(len(poolers), dim=1)
    return [_after_attention(pooler, x) for pooler, x in zip(poolers, sums, strict=True)]


def _is_single_cross_attention(pooler: AttentivePooler) -> bool:
    return isinstance(pooler.cross_attention_block, CrossAttentionBlock) and not pooler.blocks


def _block_and_norm(pooler: AttentivePooler) -> tuple[CrossAttentionBlock, nn.LayerNorm]:
    """The only block of a pooler, and the norm of its tokens."""
    block = pooler.cross_attention_block
    assert isinstance(block, CrossAttentionBlock)
    assert isinstance(block.norm1, nn.LayerNorm)
    return block, block.norm1


def _queries_before_keys(pooler: AttentivePooler) -> Tensor:
    """W_kᵀq of every attention head and query, [H·Q, D], with the scales of softmax and norm."""
    block, norm = _block_and_norm(pooler)
    attention = block.xattn
    keys = attention.kv.weight.chunk(2)[0]
    q = rearrange(attention.q(pooler.query_tokens[0]), "Q (H d) -> H Q d", H=attention.num_heads)
    k = rearrange(keys, "(H d) D -> H d D", H=attention.num_heads)
    return rearrange(einsum(q, k, "H Q d, H d D -> H Q D") * attention.head_dim**-0.5 * norm.weight, "H Q D -> (H Q) D")


def _after_attention(pooler: AttentivePooler, sums: Tensor) -> Tensor:
    """The rest of the block, from the weighted sums of normalized tokens [B, H·Q, D] to [B, Q, D]."""
    block, norm = _block_and_norm(pooler)
    attention = block.xattn
    values = attention.kv.weight.chunk(2)[1]
    sums = sums * norm.weight + norm.bias
    sums = rearrange(sums, "B (H Q) D -> B H Q D", H=attention.num_heads)
    v = rearrange(values, "(H d) D -> H d D", H=attention.num_heads)
    y = rearrange(einsum(sums, v, "B H Q D, H d D -> B H Q d"), "B H Q d -> B Q (H d)")
    if attention.kv.bias is not None:
        y = y + attention.kv.bias.chunk(2)[1]
    x = pooler.query_tokens + attention.proj(y)
    return x + block.mlp(block.norm2(x))
