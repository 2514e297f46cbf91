"""The two feed-forward layers of a transformer block."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """Linear, activation, linear: [..., in_features] -> [..., out_features]; sizes not given equal `in_features`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))

    @property
    def output(self) -> nn.Linear:
        """The layer that writes into the residual stream."""
        return self.fc2


class SwiGLU(nn.Module):
    """fc3(silu(fc1 x) * fc2 x), "GLU Variants Improve Transformer" (Shazeer 2020), equation 6, named as in V-JEPA 2.

    `wide_silu` narrows the hidden width to 2/3, rounded up to a multiple of 8: then the layer costs as much as an MLP.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        wide_silu: bool = True,
        drop: float = 0.0,
    ):
        super().__init__()
        hidden_features = hidden_features or in_features
        if wide_silu:
            hidden_features = (int(2 * hidden_features / 3) + 7) // 8 * 8
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(in_features, hidden_features)
        self.fc3 = nn.Linear(hidden_features, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc3(self.drop(F.silu(self.fc1(x)) * self.fc2(x))))

    @property
    def output(self) -> nn.Linear:
        """The layer that writes into the residual stream."""
        return self.fc3
