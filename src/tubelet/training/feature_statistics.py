"""Numbers that show a collapsing encoder, which the loss alone does not."""

import torch
from torch import Tensor


def rank_me(features: Tensor, *, center: bool) -> float:
    """Effective rank of `features` [samples, D]: exp of the entropy of its normalised singular values.

    RankMe (Garrido et al. 2023, eq. 1). Centred features can keep a high rank while everything that is left is a small
    noise round one vector; the uncentred rank then falls towards 1, so both are worth showing.
    """
    features = features.double()
    if center:
        features = features - features.mean(0)
    singular = torch.linalg.svdvals(features)
    p = singular / singular.sum().clamp_min(1e-12)
    return float(torch.exp(-(p * torch.log(p.clamp_min(1e-12))).sum()))


def spread(tokens: Tensor) -> tuple[float, float]:
    """Standard deviation of `tokens` [B, N, D] within a clip and across clips, relative to their overall magnitude.

    Within: over the tokens of a clip. Across: over the clips' mean tokens. 0 means that all is the same vector.
    """
    tokens = tokens.double()
    magnitude = tokens.square().mean().sqrt().clamp_min(1e-12)
    within = tokens.var(dim=1, unbiased=False).mean().sqrt()
    across = tokens.mean(dim=1).var(dim=0, unbiased=False).mean().sqrt()
    return float(within / magnitude), float(across / magnitude)


def knn_accuracy(features: Tensor, labels: Tensor, k: int = 5) -> float:
    """Share, in percent, of `features` [samples, D] whose label is that of most of their k nearest others (cosine)."""
    unit = torch.nn.functional.normalize(features - features.mean(0), dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-torch.inf)
    nearest = labels[similarity.topk(min(k, len(labels) - 1), dim=1).indices]
    votes = torch.nn.functional.one_hot(nearest).sum(1)
    return 100 * float((votes.argmax(1) == labels).float().mean())
