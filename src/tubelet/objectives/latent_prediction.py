"""Prediction of the latents of the frames that follow a clip, with noise on those latents; see `latent_video`."""

from typing import Protocol

import torch
from torch import Tensor, nn

from tubelet.data import Batch
from tubelet.objectives.frame_prediction import to_frames
from tubelet.runtime.seeds import torch_generator
from tubelet.training.objective import Objective, StepRng

WEIGHTS = {"loss_latents": 1.0, "loss_pixels": 3.0, "loss_painted": 3.0}
"""Latents have variance 1; the cross-entropy of pixels of dark frames is a fraction of 1."""


class LatentModel(Protocol):
    """A model such as `tubelet.generation.latent_video.LatentVideoModel`."""

    def losses(self, seen: Tensor, future: Tensor, noise: Tensor, timestep: Tensor, blur: Tensor) -> dict[str, Tensor]:
        """Compute the losses that `WEIGHTS` names."""

    def trained(self) -> nn.Module:
        """Return the module that learns."""

    def noise_shape(self, seen: Tensor) -> tuple[int, ...]:
        """Return the shape of the future latents of one clip."""

    def noise_step(self, position: float) -> int:
        """Return the time step for a uniform random number from 0 to 1."""


class LatentPrediction(Objective):
    """Trains a codec of frames and a predictor of its latents at once.

    Args:
        model: The model.
        num_frames: Frames seen; the rest of each clip is to be predicted.
        channels: 3 for color, 1 for grayscale.
    """

    fixed_targets = True

    def __init__(self, model: LatentModel, num_frames: int, channels: int):
        super().__init__()
        self.model, self.num_frames, self.channels = model, num_frames, channels

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute the weighted sum of the losses of pixels and latents, and each of them."""
        frames = to_frames(batch.clips, self.channels)
        seen, future = frames[:, :, : self.num_frames], frames[:, :, self.num_frames :]
        shape, noises, blurs, steps = self.model.noise_shape(seen), [], [], []
        for seed in rng.clip_seeds(batch, "latent noise"):
            generator = torch_generator(seed, device=frames.device)
            noises.append(torch.randn(shape, generator=generator, device=frames.device))
            blurs.append(torch.randn(shape, generator=generator, device=frames.device))
            steps.append(self.model.noise_step(_uniform(seed)))
        timestep = torch.tensor(steps, device=frames.device)
        losses = self.model.losses(seen, future, torch.stack(noises), timestep, torch.stack(blurs))
        loss = torch.stack([weight * losses[name] for name, weight in WEIGHTS.items()]).sum()
        return {"loss": loss, **{name: value.detach() for name, value in losses.items()}}

    def parts(self) -> dict[str, nn.Module]:
        return {"model": self.model.trained()}


def _uniform(seed: int) -> float:
    """Return a uniform random number in [0, 1) from a seed, on the host: no read from the device."""
    return float(torch.rand((), generator=torch_generator(seed, "noise level")))
