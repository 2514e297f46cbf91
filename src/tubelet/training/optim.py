"""AdamW with the decay groups of the field."""

from collections.abc import Iterable

import torch
from torch import nn


def adamw(
    modules: Iterable[nn.Module],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over what is trained in `modules`; biases and vectors (norms' scales) are not decayed.

    The fused kernel is asked for everywhere: it is the fastest, and it can skip an update with non-finite gradients
    without reading anything back from the device.
    """
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and not name.endswith("bias")]
    undecayed = [p for name, p in named if p.ndim <= 1 or name.endswith("bias")]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": undecayed, "weight_decay": 0.0, "undecayed": True},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def set_hyperparameters(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Give every group its learning rate, and the decayed ones their weight decay, for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = 0.0 if group.get("undecayed") else weight_decay
