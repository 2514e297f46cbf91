"""The terms of VICReg (Bardes et al. 2022, arXiv:2105.04906)."""

import itertools

import torch
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
