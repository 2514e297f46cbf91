"""Nearest neighbors by cosine similarity, and their votes for classes."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ENTRIES = 2**26
"""Similarities that are computed at a time."""


def directions(vectors: Tensor, mean: Tensor | None = None) -> Tensor:
    """Vectors [n, D] as float32 unit vectors, after `mean` [D] is subtracted."""
    vectors = vectors.float()
    return F.normalize(vectors if mean is None else vectors - mean, dim=1)


def nearest(
    queries: Tensor, gallery: Tensor, k: int, groups: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The most similar vectors of a gallery, by an exact search in chunks.

    Args:
        queries: Unit vectors [n, D].
        gallery: Unit vectors [m, D].
        k: Number of neighbors.
        groups: int64 [n] and [m], the group of each query and of each vector of the gallery, such as its video. No
            neighbor is of the query's own group. None: all are candidates.

    Returns:
        Cosine similarities [n, K] in descending order and int64 indices [n, K]. K is `k`, or the number of candidates
        that every query has, if that is smaller.
    """
    candidates = len(gallery)
    if groups is not None:
        candidates -= int(torch.bincount(groups[1]).max())
    k = min(k, candidates)
    if k < 1:
        raise ValueError("the gallery has no vectors of other groups than the query's")
    found = []
    for rows in torch.arange(len(queries), device=queries.device).split(max(1, MAX_ENTRIES // len(gallery))):
        similarity = queries[rows] @ gallery.T
        if groups is not None:
            similarity.masked_fill_(groups[0][rows, None] == groups[1], -torch.inf)
        found.append(similarity.topk(k, dim=1))
    similarities, indices = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(indices)


def votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float | None) -> Tensor:
    """Fractions of the votes for each class.

    As in Wu et al. 2018 and DINO (Caron et al. 2021), a neighbor votes with the weight exp(similarity / temperature).

    Args:
        similarity: Similarities [n, k] of the neighbors.
        labels: int64 [n, k], their classes.
        num_classes: Number of classes.
        temperature: None: all neighbors have the same weight.

    Returns:
        [n, num_classes], each row with the sum 1.
    """
    k = similarity.shape[1]
    weights = torch.full_like(similarity, 1 / k) if temperature is None else (similarity / temperature).softmax(1)
    return similarity.new_zeros(len(similarity), num_classes).scatter_add_(1, labels, weights)


def retrieval_scores(
    queries: Tensor,
    gallery: Tensor,
    query_labels: Tensor,
    gallery_labels: Tensor,
    recall: Sequence[int],
    groups: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """Recall and mean average precision of retrieval by class.

    Args:
        queries, gallery, groups: See `nearest`.
        query_labels, gallery_labels: int64 [n] and [m].
        recall: Numbers k.

    Returns:
        `recall@k`, the fraction of queries with a neighbor of their class among the first k, and `map`, the mean over
        queries of the average precision of the whole ranking. Queries without a candidate of their class count as 0 in
        recall and are left out of `map`.
    """
    hits = dict.fromkeys(recall, 0)
    precisions = []
    for rows in torch.arange(len(queries), device=queries.device).split(max(1, MAX_ENTRIES // len(gallery))):
        similarity = queries[rows] @ gallery.T
        relevant = query_labels[rows, None] == gallery_labels
        if groups is not None:
            own = groups[0][rows, None] == groups[1]
            similarity.masked_fill_(own, -torch.inf)  # at the end of the ranking, where they are not relevant
            relevant &= ~own
        ranked = relevant.gather(1, similarity.argsort(dim=1, descending=True, stable=True))
        for k in recall:
            hits[k] += int(ranked[:, :k].any(1).sum())
        counts = ranked.sum(1)
        precision = ranked.cumsum(1) / torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        average = (precision * ranked).double().sum(1) / counts.clamp_min(1)
        precisions.append(average[counts > 0])
    found = torch.cat(precisions)
    scores = {f"recall@{k}": hit / len(queries) for k, hit in hits.items()}
    return scores | ({"map": float(found.mean())} if len(found) else {})
