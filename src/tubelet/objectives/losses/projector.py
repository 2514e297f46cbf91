"""The projector between an encoder and a loss on its features."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.objectives.losses.distributed import mean_over_processes


class BatchNorm(nn.Module):
    """Batch normalization of rows [..., D] with the statistics of all processes, always those of the batch.

    It has no running statistics: a projector is used in training only, and a loss then depends on nothing but its
    batch. With gradient accumulation the statistics are those of a part of the batch. `torch.nn.SyncBatchNorm` computes
    the same on GPUs.

    Args:
        dim: Width D.
        eps: Added to the variance.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    @torch.compiler.disable  # collectives
    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
        centred = rows - mean_over_processes(rows.mean(0))
        variance = mean_over_processes(centred.square().mean(0))
        return (centred * (variance + self.eps).rsqrt() * self.weight + self.bias).view_as(x)


class Projector(nn.Module):
    """Linear, batch norm, GELU, linear: [..., in_dim] -> [..., out_dim].

    Args:
        in_dim: Width of the features.
        hidden_dim: Width of the hidden layer.
        out_dim: Width of the projections.
    """

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(in_dim, hidden_dim, bias=False)  # the norm would remove a bias
        self.norm = BatchNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.norm(self.fc1(features))))
