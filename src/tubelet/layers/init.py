"""Initial weights of transformers."""

import torch
from torch import nn


def init_weights(module: nn.Module, std: float) -> None:
    """Truncated normal weights, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def rescale_blocks(blocks: nn.ModuleList) -> None:
    """Divide what block l = 1, 2, ... adds to the residual stream by sqrt(2 l), as BEiT (Bao et al. 2021) does."""
    for layer, block in enumerate(blocks, start=1):
        block.attn.proj.weight.mul_((2.0 * layer) ** -0.5)
        block.mlp.output.weight.mul_((2.0 * layer) ** -0.5)
