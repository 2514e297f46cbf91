"""AdamW with the decay groups of the field."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import nn


def adamw(
    modules: Iterable[nn.Module],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    lr_scales: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """AdamW over what is trained in `modules`; biases and vectors (norms' scales) are not decayed.

    lr_scales: share of the learning rate that a parameter learns at, where it is not 1; see `layer_decay`.
    The fused kernel is asked for everywhere: it is the fastest, and it can skip an update with non-finite gradients
    without reading anything back from the device.
    """
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    groups = []
    for scale in sorted({lr_scales.get(p, 1.0) for _, p in named}, reverse=True):
        alike = [(name, p) for name, p in named if lr_scales.get(p, 1.0) == scale]
        decayed = [p for name, p in alike if p.ndim > 1 and not name.endswith("bias")]
        undecayed = [p for name, p in alike if p.ndim <= 1 or name.endswith("bias")]
        own = {} if scale == 1.0 else {"lr_scale": scale}
        groups += [
            {"params": decayed, "weight_decay": weight_decay, **own},
            {"params": undecayed, "weight_decay": 0.0, "undecayed": True, **own},
        ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def layer_decay(encoder: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Shares of the learning rate that fall by `decay` from block to block, from the last one down (BEiT, Bao 2022).

    Block i of L gets decay^(L - i), counted from 0, what comes before the blocks (embedding of patches, positions)
    decay^(L + 1), what comes after them 1. Raises ValueError where the encoder has no `blocks`.
    """
    blocks = getattr(encoder, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"{type(encoder).__name__} has no `blocks` one after another, whose rates could fall")
    tops = [name.partition(".")[0] for name, _ in encoder.named_parameters()]
    before = set(tops[: tops.index("blocks")])
    scales = {}
    for name, parameter in encoder.named_parameters():
        top, _, rest = name.partition(".")
        if top == "blocks":
            scales[parameter] = decay ** (len(blocks) - int(rest.partition(".")[0]))
        else:
            scales[parameter] = decay ** (len(blocks) + 1) if top in before else 1.0
    return scales


def set_hyperparameters(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Give every group its learning rate, and the decayed ones their weight decay, for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = 0.0 if group.get("undecayed") else weight_decay
