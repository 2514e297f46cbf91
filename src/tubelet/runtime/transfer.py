"""Copies between host and device."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor in ordinary host memory to `device` without waiting for the work that is queued there.

    CUDA can do so from pinned memory only. Loaders of training data pin their batches themselves; see `Batch.to`.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
