"""Feed-forward layers of transformer blocks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """Two linear layers with an activation between them: [..., in_features] -> [..., out_features].

    Args:
        in_features: Width of the input.
        hidden_features: Width of the hidden layer; `in_features` if None.
        out_features: Width of the output; `in_features` if None.
        act_layer: Factory of the activation.
        drop: Dropout probability after the activation and after the second linear layer.
    """

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
        """The layer that writes to the residual stream."""
        return self.fc2


class SwiGLU(nn.Module):
    """Gated feed-forward layer fc3(silu(fc1(x)) * fc2(x)): [..., in_features] -> [..., out_features].

    "GLU Variants Improve Transformer" (Shazeer 2020), equation 6. The layers are named as in V-JEPA 2.

    Args:
        in_features: Width of the input.
        hidden_features: Width of the hidden layer; `in_features` if None.
        out_features: Width of the output; `in_features` if None.
        wide_silu: Reduce the hidden width to 2/3, rounded up to a multiple of 8, so that the layer has about as many
            parameters as an MLP with `hidden_features`.
        drop: Dropout probability after the gate and after the output layer.
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
        """The layer that writes to the residual stream."""
        return self.fc3
