"""Attentive probe: learned queries attend to the tokens of a frozen encoder (V-JEPA, Bardes et al. 2024, section 4)."""

from collections.abc import Callable

import torch
from torch import nn

from tubelet.layers import Block, CrossAttention, CrossAttentionBlock
from tubelet.layers.block import run_block
from tubelet.layers.init import init_weights, rescale_blocks


class AttentivePooler(nn.Module):
    """Pool tokens [B, N, D] with learned queries -> [B, num_queries, D].

    As in V-JEPA 2, `depth - 1` self-attention blocks over the tokens precede the cross-attention of the queries.

    Args:
        num_queries: Number of learned queries.
        embed_dim: Width D of the tokens.
        num_heads: Attention heads per block; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLPs divided by `embed_dim`.
        depth: Number of blocks, including the cross-attention block.
        norm_layer: Factory of the normalization layers, called with `embed_dim`.
        init_std: Standard deviation of the initial weights and queries (truncated normal).
        qkv_bias: Add a learnable bias to queries, keys and values.
        complete_block: Use a transformer block with cross-attention; cross-attention without MLP otherwise.
        use_proj: Apply the output projection of the cross-attention. V-JEPA's released probes were trained without it.
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If `num_heads` does not divide `embed_dim`.
    """

    def __init__(
        self,
        num_queries: int = 1,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        depth: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float = 0.02,
        qkv_bias: bool = True,
        complete_block: bool = True,
        use_proj: bool = True,
        use_activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.use_activation_checkpointing = use_activation_checkpointing
        self.cross_attention_block: CrossAttentionBlock | CrossAttention
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer=norm_layer) for _ in range(depth - 1)
        )
        if complete_block:
            block = CrossAttentionBlock(
                embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer=norm_layer, use_proj=use_proj
            )
            self.cross_attention_block = block
            output_layers = [block.xattn.proj, block.mlp.output]
        else:
            self.cross_attention_block = CrossAttention(embed_dim, num_heads, qkv_bias, use_proj)
            output_layers = [self.cross_attention_block.proj]
        nn.init.trunc_normal_(self.query_tokens, std=init_std)
        init_weights(self, init_std)
        rescale_blocks(self.blocks)
        with torch.no_grad():
            for layer in output_layers:
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_((2.0 * depth) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = run_block(block, x, use_checkpoint=self.use_activation_checkpointing and self.training)
        return self.cross_attention_block(self.query_tokens.expand(len(x), -1, -1), x)


class AttentiveClassifier(nn.Module):
    """Classify tokens [B, N, D] -> logits [B, num_classes]: an AttentivePooler with one query and a linear layer.

    Args:
        num_classes: Number of classes.

    The other arguments are those of `AttentivePooler`.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        depth: int = 1,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float = 0.02,
        qkv_bias: bool = True,
        num_classes: int = 1000,
        complete_block: bool = True,
        use_proj: bool = True,
        use_activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.pooler = AttentivePooler(
            num_queries=1,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            depth=depth,
            norm_layer=norm_layer,
            init_std=init_std,
            qkv_bias=qkv_bias,
            complete_block=complete_block,
            use_proj=use_proj,
            use_activation_checkpointing=use_activation_checkpointing,
        )
        self.linear = nn.Linear(embed_dim, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.pooler(x).squeeze(1))
