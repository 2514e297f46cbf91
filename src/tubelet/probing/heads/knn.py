"""Nearest neighbors of the mean token, a read-out without parameters to learn."""

import functools
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tubelet.probing.heads import FittedHead, pool


class NearestNeighborsHead(FittedHead):
    """Weighted vote of the k training samples with the most similar mean tokens.

    As in Wu et al. 2018 and DINO (Caron et al. 2021): the similarity is the cosine, and a neighbor votes for its class
    with the weight exp(similarity / temperature). The mean token of the training set is subtracted first, without which
    all tokens of an encoder may have about the same direction.

    Args:
        embed_dim: Width D of the tokens.
        num_classes: Number of classes.
        num_samples: Number of training samples n; `fit` sets it.
        k: Numbers of neighbors to select from; of a single head, its number.
        temperature: Temperature of the votes.
    """

    reads = "mean"
    grid_option = "k"
    mean: Tensor
    samples: Tensor
    labels: Tensor

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        num_samples: int = 0,
        k: Annotated[Sequence[Annotated[int, Field(ge=1)]], Field(min_length=1)] = (1, 5, 10, 20, 50),
        temperature: Annotated[float, Field(gt=0)] = 0.07,
    ):
        super().__init__()
        self.num_classes, self.k, self.temperature = num_classes, k[0], temperature
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("samples", torch.zeros(num_samples, embed_dim))
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.int64))

    def fit(self, tokens: Tensor, labels: Tensor) -> None:
        tokens = pool(tokens, 1)[:, 0]
        self.mean = tokens.mean(0)
        self.samples, self.labels = F.normalize(tokens - self.mean, dim=1), labels

    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probabilities [B, num_classes], the logarithms of the fractions of the votes."""
        with torch.autocast(tokens.device.type, enabled=False):
            similarity = F.normalize(pool(tokens, 1)[:, 0] - self.mean, dim=1) @ self.samples.T
            nearest, neighbors = similarity.topk(min(self.k, len(self.samples)), dim=1)
            log_weights = (nearest / self.temperature).log_softmax(1)
            votes = similarity.new_zeros(len(tokens), self.num_classes)
            return votes.scatter_add_(1, self.labels[neighbors], log_weights.exp()).log()


knn = functools.partial(NearestNeighborsHead)
