"""Nearest neighbors of the mean token, a read-out without parameters to learn."""

import functools
from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from tubelet.probing import neighbors
from tubelet.probing.heads import FittedHead, pool


class NearestNeighborsHead(FittedHead):
    """Weighted vote of the k training samples with the most similar mean tokens.

    See `tubelet.probing.neighbors`. The mean token of the training set is subtracted first, without which all tokens of
    an encoder may have about the same direction.

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
        self.samples, self.labels = neighbors.directions(tokens, self.mean), labels

    def forward(self, tokens: Tensor) -> Tensor:
        """Log-probabilities [B, num_classes], the logarithms of the fractions of the votes."""
        with torch.autocast(tokens.device.type, enabled=False):
            queries = neighbors.directions(pool(tokens, 1)[:, 0], self.mean)
            similarity, indices = neighbors.nearest(queries, self.samples, self.k)
            return neighbors.votes(similarity, self.labels[indices], self.num_classes, self.temperature).log()


knn = functools.partial(NearestNeighborsHead)
