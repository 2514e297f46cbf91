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


def all_gather_with_grad(features: Tensor) -> Tensor:
    """Gather the features [B, …] of every process's clips: [processes · B, …].

    Each process computes the same term from the result, and gradients are averaged over the processes afterwards. The
    gradient of the local rows is therefore scaled so that the average is the gradient of that one term.
    """
    if not dist.is_initialized():
        return features
    count, local = dist.get_world_size(), features.detach()
    gathered = [torch.empty_like(local) for _ in range(count)]
    dist.all_gather(gathered, local.contiguous())
    gathered[dist.get_rank()] = local + count * (features - local)
    return torch.cat(gathered)


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
