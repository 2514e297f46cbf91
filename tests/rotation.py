"""Rotary positions in real arithmetic, as a reference for tests."""

import torch


def rotated(z: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs of z [..., width] by cosines and sines [..., width / 2, 2]."""
    (a, b), (cos, sin) = (z[..., ::2], z[..., 1::2]), rotation.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
