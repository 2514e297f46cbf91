"""Metrics of predicted frames: MSE, PSNR and SSIM."""

from collections.abc import Callable
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor

MAX_PSNR = 100.0  # in dB; the PSNR of a perfect prediction would be infinite


class FrameMetrics:
    """Mean metrics of each predicted frame over clips [B, C, T, H, W] with values from 0 to 1.

    - `mse`: squared error, averaged over pixels and channels.
    - `mse_sum`: squared error, summed over pixels and channels as in the literature on Moving MNIST.
    - `psnr`: peak signal-to-noise ratio in dB.
    - `ssim`: structural similarity (Wang et al. 2004) with a Gaussian window of 11 pixels, standard deviation 1.5 and
      reflection padding.

    Args:
        num_frames: Number of predicted frames T.
    """

    def __init__(self, num_frames: int):
        self.clips = 0
        self.sums = torch.zeros(3, num_frames, dtype=torch.float64)
        self.pixels = 0

    @torch.no_grad()
    def update(self, predicted: Tensor, true: Tensor) -> None:
        """Add a batch of predicted and true frames."""
        from torchmetrics.functional.image import (  # slow import, needed only after training
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )

        batch = len(true)
        predicted, true = (rearrange(x.float(), "B C T H W -> (B T) C H W") for x in (predicted, true))
        mse = (predicted - true).square().mean(dim=(1, 2, 3))
        psnr = peak_signal_noise_ratio(predicted, true, data_range=1.0, reduction="none", dim=(1, 2, 3))
        ssim = cast(Tensor, structural_similarity_index_measure(predicted, true, data_range=1.0, reduction="none"))
        frame_metrics = torch.stack([mse, psnr.clamp(max=MAX_PSNR), ssim]).unflatten(1, (batch, -1))
        self.sums += frame_metrics.double().sum(dim=1).cpu()
        self.clips += batch
        self.pixels = true[0].numel()

    def gather(self, sum_over_processes: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Reduce the sums over all processes. `pixels` is equal in all processes that have clips."""
        counts = sum_over_processes(torch.tensor([self.clips], device=device))
        self.sums = sum_over_processes(self.sums.to(device)).cpu()
        self.clips = int(counts)

    def compute(self) -> dict[str, Any]:
        """Return the means over all frames and, as `per_frame`, the mean of each predicted frame."""
        mse, psnr, ssim = self.sums / self.clips
        metrics = {"mse_sum": mse * self.pixels, "mse": mse, "psnr": psnr, "ssim": ssim}
        means = {name: round(float(values.mean()), 6) for name, values in metrics.items()}
        return means | {"per_frame": {name: [round(v, 6) for v in values.tolist()] for name, values in metrics.items()}}
