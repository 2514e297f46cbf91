"""How far predicted frames are from the true ones: MSE, PSNR and SSIM."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

MAX_PSNR = 100.0  # dB of a frame that is exactly right, which would otherwise be infinitely good


class FrameMetrics:
    """Means over clips, for each frame ahead, of clips [B, C, T, H, W] with values from 0 to 1.

    `mse` is the mean over pixels and channels; `mse_sum` their sum over a frame, as the literature on Moving MNIST
    gives it. `psnr` in dB, of each frame. `ssim` of each frame: Wang et al. 2004, a Gaussian window of 11 pixels
    with a deviation of 1.5 around each pixel, reflected at the edges.
    """

    def __init__(self, num_frames: int):
        self.clips = 0
        self.sums = torch.zeros(3, num_frames, dtype=torch.float64)
        self.pixels = 0

    @torch.no_grad()
    def update(self, predicted: Tensor, true: Tensor) -> None:
        from torchmetrics.functional.image import (  # takes seconds, which only a finished training should need
            peak_signal_noise_ratio,
            structural_similarity_index_measure,
        )

        batch = len(true)
        predicted, true = (rearrange(x.float(), "B C T H W -> (B T) C H W") for x in (predicted, true))
        mse = (predicted - true).square().mean(dim=(1, 2, 3))
        psnr = peak_signal_noise_ratio(predicted, true, data_range=1.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(predicted, true, data_range=1.0, reduction="none")
        of_frames = torch.stack([mse, psnr.clamp(max=MAX_PSNR), ssim]).unflatten(1, (batch, -1))
        self.sums += of_frames.double().sum(dim=1).cpu()
        self.clips += batch
        self.pixels = true[0].numel()

    def gather(self, sum_over_processes: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Put the clips of all processes together; `pixels` is the same in each that saw one."""
        counts = sum_over_processes(torch.tensor([self.clips], device=device))
        self.sums = sum_over_processes(self.sums.to(device)).cpu()
        self.clips = int(counts)

    def compute(self) -> dict[str, Any]:
        """Means over all frames, and under `per_frame` those of each frame ahead."""
        mse, psnr, ssim = self.sums / self.clips
        measured = {"mse_sum": mse * self.pixels, "mse": mse, "psnr": psnr, "ssim": ssim}
        means = {name: round(float(values.mean()), 6) for name, values in measured.items()}
        return means | {
            "per_frame": {name: [round(v, 6) for v in values.tolist()] for name, values in measured.items()}
        }
