"""AdamW with the parameter groups usual in the field, layer-wise rates, and gradient clipping."""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn

from tubelet.runtime.parallelize import full_tensor


def adamw(
    modules: Iterable[nn.Module],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    lr_scales: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """Build AdamW for the trainable parameters of `modules`; biases and vectors (scales of norms) are not decayed.

    The fused kernel is the fastest. It skips an update with non-finite gradients without reading from the device.

    Args:
        modules: Modules to train.
        lr: Learning rate.
        weight_decay: Weight decay of weight matrices; biases and vectors are not decayed.
        betas: Coefficients of AdamW's running averages.
        eps: Epsilon of AdamW.
        lr_scales: Factors on the learning rate of single parameters, see `layer_decay`.
    """
    named = [(name, p) for module in modules for name, p in module.named_parameters() if p.requires_grad]
    groups = []
    for scale in sorted({lr_scales.get(p, 1.0) for _, p in named}, reverse=True):
        alike = [(name, p) for name, p in named if lr_scales.get(p, 1.0) == scale]
        decayed = [p for name, p in alike if p.ndim > 1 and not name.endswith("bias")]
        undecayed = [p for name, p in alike if p.ndim <= 1 or name.endswith("bias")]
        extra = {} if scale == 1.0 else {"lr_scale": scale}
        groups += [
            {"params": decayed, "weight_decay": weight_decay, **extra},
            {"params": undecayed, "weight_decay": 0.0, "undecayed": True, **extra},
        ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def layer_decay(encoder: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """Return factors on the learning rate that decrease by `decay` from block to block, from the last one down.

    As in BEiT (Bao et al. 2022): block i of L, counted from 0, gets decay^(L - i), parameters before the blocks (patch
    embedding, positions) decay^(L + 1), parameters after them 1.

    Raises:
        ValueError: The encoder has no `blocks`.
    """
    blocks = getattr(encoder, "blocks", None)
    if not isinstance(blocks, nn.ModuleList):
        raise ValueError(f"{type(encoder).__name__} has no `blocks`: use a layer decay of 1")
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
    """Set the learning rate of every parameter group, and the weight decay of those that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        group["weight_decay"] = 0.0 if group.get("undecayed") else weight_decay


def clip_gradients(groups: Sequence[Sequence[nn.Parameter]], max_norm: float, *, separately: bool = False) -> Tensor:
    """Clip gradients in place.

    Args:
        groups: Parameters, by the part of the model.
        max_norm: Largest gradient norm; the gradients are only read if it is infinite.
        separately: Whether it limits the norm of each group by itself, or that of all of them together.

    Returns:
        The norm of all gradients before clipping, on the device.
    """
    if not separately:
        groups = [[parameter for group in groups for parameter in group]]
    norms = []
    for group in groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        if max_norm < math.inf:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
        norms.append(full_tensor(norm))
    return norms[0] if len(norms) == 1 else torch.stack(norms).norm()
