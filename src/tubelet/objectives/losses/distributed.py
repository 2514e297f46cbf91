"""Statistics over the clips of all processes, with gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Average a small tensor over the processes; the gradient is that of the mean loss over the processes.

    The trainer averages the gradients of the processes, so the objective is the mean of their losses, each of which
    may depend on the tensors of all. The backward pass therefore averages the gradients of the result.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    return _Mean.apply(tensor)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _all_reduce(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduce(gradient)


def _all_reduce(tensor: Tensor) -> Tensor:
    mean = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(mean)
    return mean.div_(dist.get_world_size())
