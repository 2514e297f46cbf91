"""k-means, and the agreement of clusters with labels."""

from typing import NamedTuple

import torch
from torch import Tensor

from tubelet.runtime.seeds import torch_generator


class Clusters(NamedTuple):
    """A clustering of n vectors.

    Attributes:
        assignment: int64 [n].
        centers: [k, D].
        distances: Distance [n] of each vector from its center.
        inertia: Sum of the squared distances.
    """

    assignment: Tensor
    centers: Tensor
    distances: Tensor
    inertia: float


def kmeans(vectors: Tensor, k: int, seed: int, *, restarts: int = 1, max_steps: int = 100) -> Clusters:
    """Lloyd's algorithm from k-means++ (Arthur & Vassilvitskii 2007); the best of several starts.

    Args:
        vectors: float [n, D], n >= k.
        k: Number of clusters.
        seed: Seed of the starts.
        restarts: Number of starts.
        max_steps: Steps after which a start ends that has not converged.
    """
    if not 1 <= k <= len(vectors):
        raise ValueError(f"{k} clusters of {len(vectors)} vectors are impossible")
    runs = [_lloyd(vectors, _plus_plus(vectors, k, seed, number), max_steps) for number in range(restarts)]
    return min(runs, key=lambda run: run.inertia)


def _plus_plus(vectors: Tensor, k: int, seed: int, number: int) -> Tensor:
    """Draw k of the vectors, each with a probability in proportion to its squared distance from those drawn before."""
    generator = torch_generator(seed, "k-means", number)
    chosen = [int(torch.randint(len(vectors), (1,), generator=generator))]
    nearest = torch.full((len(vectors),), torch.inf, dtype=torch.float64)
    for _ in range(k - 1):
        nearest = nearest.minimum((vectors - vectors[chosen[-1]]).square().sum(1).double().cpu())
        total = nearest.cumsum(0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, drawn, right=True)), len(vectors) - 1))
    return vectors[chosen]


def _lloyd(vectors: Tensor, centers: Tensor, max_steps: int) -> Clusters:
    assignment = torch.full((len(vectors),), -1, device=vectors.device)
    for _ in range(max_steps):
        previous, (distances, assignment) = assignment, torch.cdist(vectors, centers).min(1)
        if torch.equal(assignment, previous):
            break
        counts = assignment.bincount(minlength=len(centers))
        sums = torch.zeros_like(centers).index_add_(0, assignment, vectors)
        centers = sums / counts.clamp_min(1)[:, None]
        if (empty := (counts == 0).nonzero()[:, 0]).numel():  # an empty cluster takes the farthest vector
            centers[empty] = vectors[distances.topk(len(empty)).indices]
    distances, assignment = torch.cdist(vectors, centers).min(1)
    return Clusters(assignment, centers, distances, float(distances.double().square().sum()))


def agreement(assignment: Tensor, labels: Tensor) -> dict[str, float]:
    """Purity and normalized mutual information of clusters and classes, both int64 [n].

    Purity is the fraction of samples whose class is the most frequent one of their cluster. NMI is the mutual
    information divided by the mean of the two entropies; it is 1 where both have a single value.
    """
    _, classes = labels.unique(return_inverse=True)
    joint = torch.zeros(int(assignment.max()) + 1, int(classes.max()) + 1, dtype=torch.float64)
    joint.index_put_((assignment, classes), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    joint /= len(labels)
    entropies = [_entropy(joint.sum(1)), _entropy(joint.sum(0))]
    mutual = sum(entropies) - _entropy(joint.flatten())
    nmi = 2 * mutual / sum(entropies) if sum(entropies) > 0 else 1.0
    return {"purity": float(joint.max(1).values.sum()), "nmi": max(0.0, nmi)}


def _entropy(p: Tensor) -> float:
    return float(-torch.special.xlogy(p, p).sum())
