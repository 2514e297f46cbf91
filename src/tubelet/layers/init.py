"""Weight initialization of transformers."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def init_weights(module: nn.Module, std: float) -> None:
    """Initialize all linear and convolution layers: truncated normal weights with deviation `std`, zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def rescale_blocks(blocks: Iterable[Any]) -> None:
    """Divide the output weights of block l = 1, 2, ... by sqrt(2 l), as in BEiT (Bao et al. 2021).

    The output layers are those that write to the residual stream: the attention projection and the last linear layer of
    the MLP.

    Args:
        blocks: Transformer blocks with layers `attn.proj` and `mlp.output`, first to last.
    """
    for layer, block in enumerate(blocks, start=1):
        block.attn.proj.weight.mul_((2.0 * layer) ** -0.5)
        block.mlp.output.weight.mul_((2.0 * layer) ** -0.5)
