"""The attentive probe: learned queries read the tokens of a frozen encoder (V-JEPA, Bardes et al. 2024, section 4)."""

from collections.abc import Callable

import torch
from torch import nn

from tubelet.layers import Block, CrossAttention, CrossAttentionBlock
from tubelet.layers.block import run_block
from tubelet.layers.init import init_weights, rescale_blocks


class AttentivePooler(nn.Module):
    """Tokens [B, N, D] -> [B, num_queries, D].

    `depth - 1` self-attention blocks over the tokens, as in V-JEPA 2, then the queries read them: by a whole block with
    `complete_block`, else by attention alone. `use_proj=False` leaves out the cross-attention's output projection, as
    V-JEPA's released probes need it. Raises ValueError when the heads do not divide the width.
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
        self.query_tokens = nn.Parameter(torch.zeros(1, num_queries, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer=norm_layer) for _ in range(depth - 1)
        )
        if complete_block:
            self.cross_attention_block = CrossAttentionBlock(
                embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer=norm_layer, use_proj=use_proj
            )
            outputs = [self.cross_attention_block.xattn.proj, self.cross_attention_block.mlp.output]
        else:
            self.cross_attention_block = CrossAttention(embed_dim, num_heads, qkv_bias, use_proj)
            outputs = [self.cross_attention_block.proj]
        nn.init.trunc_normal_(self.query_tokens, std=init_std)
        init_weights(self, init_std)
        rescale_blocks(self.blocks)
        with torch.no_grad():
            for layer in outputs:
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_((2.0 * depth) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = run_block(block, x, save_memory=self.use_activation_checkpointing and self.training)
        return self.cross_attention_block(self.query_tokens.expand(len(x), -1, -1), x)


class AttentiveClassifier(nn.Module):
    """Tokens [B, N, D] -> logits [B, num_classes]: an AttentivePooler with one query, then a linear layer."""

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
