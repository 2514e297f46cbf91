"""Frames to come, from a model as far ahead as one likes, and from rules that need no model.

Frames are [B, C, T, H, W] with values from 0 to 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Forecast = Callable[[Tensor], Tensor]
"""Frames seen -> the next ones, as many as it was made for."""


def roll_out(forecast: Forecast, seen: Tensor, num_frames: int) -> Tensor:
    """The `num_frames` frames after `seen`: `forecast` sees its own frames, as many as in `seen`, again and again."""
    length = seen.shape[2]
    frames = seen
    while frames.shape[2] < length + num_frames:
        frames = torch.cat([frames, forecast(frames[:, :, -length:]).clamp(0, 1)], dim=2)
    return frames[:, :, length : length + num_frames]


def copy_last(seen: Tensor, num_frames: int) -> Tensor:
    """Nothing moves any more."""
    return seen[:, :, -1:].expand(-1, -1, num_frames, -1, -1)


def extrapolate(seen: Tensor, num_frames: int) -> Tensor:
    """Each pixel goes on changing as between the last two frames, within 0 and 1."""
    last, change = seen[:, :, -1:], seen[:, :, -1:] - seen[:, :, -2:-1]
    ahead = torch.arange(1, num_frames + 1, device=seen.device).view(-1, 1, 1)
    return (last + change * ahead).clamp(0, 1)


def mean_frame(seen: Tensor, num_frames: int) -> Tensor:
    """The mean of the frames seen, which gains by being blurred, as squared errors reward."""
    return seen.mean(dim=2, keepdim=True).expand(-1, -1, num_frames, -1, -1)


RULES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "copy_last": copy_last,
    "linear_extrapolation": extrapolate,
    "mean_of_seen": mean_frame,
}
