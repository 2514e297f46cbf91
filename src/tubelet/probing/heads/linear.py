"""Linear probe: a linear layer on the standardized mean token."""

import functools
from typing import ClassVar

import torch
from torch import Tensor, nn

from tubelet.probing.heads import Head, Reads, pool


class LinearHead(Head):
    """Linear classifier of the mean token, standardized with the statistics of the training set."""

    reads: ClassVar[Reads] = "mean"
    num_slots = 1
    mean: Tensor
    std: Tensor

    def __init__(self, embed_dim: int, num_classes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(embed_dim))
        self.register_buffer("std", torch.ones(embed_dim))
        self.linear = nn.Linear(embed_dim, num_classes)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        self.mean.copy_(mean)
        self.std.copy_(std.clamp_min(1e-6))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear((pool(tokens, self.num_slots).flatten(1) - self.mean) / self.std)


linear = functools.partial(LinearHead)
