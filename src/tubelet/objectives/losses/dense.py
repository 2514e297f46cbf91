"""Weights of the loss on visible tokens in V-JEPA 2.1 (arXiv:2603.14482)."""

import torch
from torch import Tensor

from tubelet.grid import Grid
from tubelet.layers.positions import locate


def distance_weights(visible: Tensor, masked: Tensor, grid: Grid) -> Tensor:
    """Return 1 / sqrt(d) for each visible token, where d is its distance to the nearest masked token.

    Distances are Euclidean, in tokens along time, height and width.

    Args:
        visible: Time-major indices of the visible tokens [B, Kc].
        masked: Time-major indices of the masked tokens [B, Kt]; none of them is visible.
        grid: Token grid (t, h, w).

    Returns:
        Weights [B, Kc] in (0, 1], float32.

    Example:
        >>> distance_weights(torch.tensor([[1, 4]]), torch.tensor([[0]]), Grid(1, 1, 5))
        tensor([[1.0000, 0.5000]])
    """
    a, b = (torch.stack(locate(indices, grid), dim=-1).float() for indices in (visible, masked))
    # Exact for the small whole numbers here, which a matrix product of the positions would not be.
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.amin(-1).rsqrt()
