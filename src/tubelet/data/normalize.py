"""Convert uint8 clips to normalized floats."""

from collections.abc import Sequence

import torch


def to_float(
    clips: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Normalize clips on their device: (clips / 255 - mean) / std.

    Args:
        clips: uint8 [..., C, T, H, W].
        mean: Mean of each channel, for colors from 0 to 1.
        std: Standard deviation of each channel.
        dtype: Type of the result; the arithmetic is float32.
    """
    x = clips.to(torch.float32, copy=True)  # overwritten below: new memory costs more than the arithmetic
    for channel, m, s in zip(x.unbind(-4), mean, std, strict=True):
        # One pass with scalar factor and summand; broadcasting over the clip takes three times as long.
        torch.add(torch.tensor(-m / s), channel, alpha=1 / (255 * s), out=channel)
    return x.to(dtype)
