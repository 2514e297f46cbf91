"""The optimiser's part of a training step, and precision: alike in every program that trains."""

import torch
from torch import Tensor

from tubelet.runtime.parallelize import full_tensor


class Updates:
    """Backward passes and updates of `optimizer` for forward passes in `dtype`; float16 losses are scaled.

    In every precision an update with non-finite gradients is left out, without waiting for the device.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, dtype: torch.dtype, device: torch.device):
        self.optimizer, self.dtype, self.device = optimizer, dtype, device
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.scales = dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, init_scale=2.0**16 if self.scales else 1.0)

    def autocast(self) -> torch.autocast:
        """The context of forward passes and losses."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients, scaled where need be."""
        self.scaler.scale(loss).backward()

    def apply(self, clip_grad: float | None) -> Tensor:
        """Clip the gradients to the norm `clip_grad`, step, and drop them; returns their norm before, on the device."""
        self.scaler.unscale_(self.optimizer)
        limit = float("inf") if clip_grad is None else clip_grad
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.trained, limit))
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.scales else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def state_dict(self) -> dict:
        """Of the scaling alone: the optimiser's state is the program's to save, as it may be sharded."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.scaler.load_state_dict(state)
