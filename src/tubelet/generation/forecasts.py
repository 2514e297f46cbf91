"""Future frames: autoregressive rollout of a model, and non-learned baselines.

Frames are [B, C, T, H, W] with values from 0 to 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Forecast = Callable[[Tensor], Tensor]
"""Function from input frames to a fixed number of future frames."""
Rollout = Callable[[Tensor, int], Tensor]
"""Function from input frames and a number to that many future frames."""


def roll_out(forecast: Forecast, seen: Tensor, num_frames: int) -> Tensor:
    """Predict any number of future frames autoregressively.

    Args:
        forecast: Function that predicts a fixed number of frames.
        seen: Input frames [B, C, T, H, W].
        num_frames: Number of frames to predict.

    Returns:
        The `num_frames` frames after `seen`, clamped to [0, 1]. After the first call, `forecast` gets the last T
        frames, which include its own predictions.
    """
    length = seen.shape[2]
    frames = seen
    while frames.shape[2] < length + num_frames:
        frames = torch.cat([frames, forecast(frames[:, :, -length:]).clamp(0, 1)], dim=2)
    return frames[:, :, length : length + num_frames]


def copy_last(seen: Tensor, num_frames: int) -> Tensor:
    """Repeat the last frame."""
    return seen[:, :, -1:].expand(-1, -1, num_frames, -1, -1)


def extrapolate(seen: Tensor, num_frames: int) -> Tensor:
    """Extrapolate each pixel linearly from the last two frames, clamped to [0, 1]."""
    last, change = seen[:, :, -1:], seen[:, :, -1:] - seen[:, :, -2:-1]
    ahead = torch.arange(1, num_frames + 1, device=seen.device).view(-1, 1, 1)
    return (last + change * ahead).clamp(0, 1)


def mean_frame(seen: Tensor, num_frames: int) -> Tensor:
    """Repeat the mean of the input frames. It is blurred, which favors it in terms of squared error."""
    return seen.mean(dim=2, keepdim=True).expand(-1, -1, num_frames, -1, -1)


BASELINES: dict[str, Rollout] = {
    "copy_last": copy_last,
    "linear_extrapolation": extrapolate,
    "mean_of_seen": mean_frame,
}
