"""The terms of VICReg (Bardes et al. 2022, arXiv:2105.04906)."""

import itertools

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def variance_hinge(features: Tensor, floor: float) -> Tensor:
    """Mean over D of how far the standard deviation over the clips of `features` [B, D] is below `floor` (eq. 1)."""
    return F.relu(floor - (features.float().var(dim=0) + 1e-4).sqrt()).mean()


def invariance(views: list[Tensor]) -> Tensor:
    """Mean squared difference between each two of the `views` [B, D] of the same clips (eq. 5)."""
    pairs = itertools.combinations(views, 2)
    return torch.stack([(a.float() - b.float()).square().mean() for a, b in pairs]).mean(0)


def covariance(features: Tensor) -> Tensor:
    """Sum of the squared off-diagonal covariances of `features` [B, D], divided by D (eq. 3)."""
    centred = features.float() - features.float().mean(0)
    cov = centred.T @ centred / (len(features) - 1)
    return (cov.square().sum() - cov.diagonal().square().sum()) / len(cov)


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
