"""What rotary positions do, in real numbers."""

import torch


def rotated(z: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """z [..., width] with its channel pairs turned by cosines and sines [..., width / 2, 2]."""
    (a, b), (cos, sin) = (z[..., ::2], z[..., 1::2]), turn.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
