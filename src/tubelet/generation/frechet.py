"""Fréchet distance of the features of clips, like FVD (Unterthiner et al. 2018) with an encoder of choice.

FVD's encoder is an I3D trained on Kinetics. Distances with another encoder cannot be compared with published ones, and
only distances with the same encoder and number of clips can be compared with each other.
"""

from collections.abc import Callable

import torch
from torch import Tensor


class FeatureMoments:
    """Mean and covariance of features [B, D], summed in float64 over batches."""

    def __init__(self, dim: int):
        self.count = torch.zeros((), dtype=torch.float64)
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        features = features.double().cpu()
        self.count += len(features)
        self.sum += features.sum(0)
        self.products += features.T @ features

    def gather(self, sum_over_processes: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Add the sums of all processes."""
        for name in ("count", "sum", "products"):
            setattr(self, name, sum_over_processes(getattr(self, name).to(device)).cpu())

    @property
    def mean(self) -> Tensor:
        return self.sum / self.count

    @property
    def covariance(self) -> Tensor:
        centered = self.products - self.count * torch.outer(self.mean, self.mean)
        return centered / (self.count - 1)


def frechet_distance(a: FeatureMoments, b: FeatureMoments) -> float:
    """Return |mean difference|^2 + tr(A + B - 2 (A B)^(1/2)) of the Gaussians with these moments.

    Raises:
        ValueError: One of them has fewer than two clips.
    """
    if min(a.count, b.count) < 2:
        raise ValueError("a covariance needs at least two clips")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap)
