"""Latent video model: frames are encoded to latents, future latents are predicted or sampled, a decoder paints them.

The predictor is a diffusion model of the future latents given the past ones that estimates the clean latents
(x0-parametrisation). From pure noise this estimate is their conditional mean, a deterministic forecast; several steps
of DDIM from noise give a sample (Song et al. 2021). One network therefore gives both.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from tubelet.config import Config
from tubelet.layers.diffusion import NoiseSchedule, TimeEmbedding, ddim_step, noise_alphas
from tubelet.runtime.seeds import torch_generator

MULTIPLE = 8
"""The sides of a frame are multiples of this number of pixels."""


class LatentConfig(Config):
    """YAML section `latent`: a codec of frames, and a diffusion model that predicts its latents."""

    channels: int = Field(16, ge=2)
    """Channels of the latents; there is one latent for each 4 x 4 pixels of a frame."""
    codec_width: int = Field(48, ge=1)
    """Channels of the convolutions that encode and decode a frame."""
    width: int = Field(64, ge=8, multiple_of=8)
    """Channels of the predictor at the resolution of the latents; it has twice as many at half of that resolution."""
    depth: int = Field(3, ge=1)
    """Residual blocks of the predictor at half resolution, between one at full resolution before and one after."""
    noise_schedule: NoiseSchedule = "cosine"
    """Noise levels of the future latents in training."""
    noise_steps: int = Field(1000, ge=2)
    """Number of noise levels."""
    mean_fraction: float = Field(0.5, gt=0, le=1)
    """Fraction of the training clips whose future is pure noise, from which the mean is predicted. The others have a
    random noise level. With 1 the model is deterministic."""
    sampling_steps: int = Field(10, ge=1)
    """Steps per sample."""
    blur: float = Field(0.1, ge=0)
    """Standard deviation of noise on the latents that the decoder learns to paint: predicted ones have errors."""


class FrameCodec(nn.Module):
    """Encode frames [N, C, H, W] to latents [N, D, H / 4, W / 4] of mean 0 and variance 1 over D, and decode them.

    Args:
        channels: Color channels C.
        latent_channels: Channels D of the latents.
        width: Channels of the convolutions.
    """

    STRIDE = 4

    def __init__(self, channels: int, latent_channels: int, width: int):
        super().__init__()
        patch = channels * self.STRIDE**2
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(self.STRIDE),
            nn.Conv2d(patch, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, patch, 3, padding=1),
            nn.PixelShuffle(self.STRIDE),
        )

    def encode(self, frames: Tensor) -> Tensor:
        latents = self.encoder(frames - 0.5)
        return F.layer_norm(latents.movedim(1, -1), latents.shape[1:2]).movedim(-1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Return logits of the pixels."""
        return self.decoder(latents)


class GatedBlock(nn.Module):
    """Residual block of two 3 x 3 convolutions with a gate: motion multiplies content.

    Args:
        dim: Channels.
        time_dim: Width of the embedding of the time step, which is added after the first convolution.
    """

    def __init__(self, dim: int, time_dim: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, dim)
        self.expand = nn.Conv2d(dim, 2 * dim, 3, padding=1)
        self.of_time = nn.Linear(time_dim, 2 * dim)
        self.reduce = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.expand(self.norm(x)) + self.of_time(time)[:, :, None, None]
        return x + self.reduce(F.glu(hidden, dim=1))


class LatentPredictor(nn.Module):
    """U-Net that estimates clean future latents from past latents and noised future latents.

    Args:
        past: Channels of all past latents together.
        future: Channels of all future latents together.
        width: Channels at the resolution of the latents, twice as many at half resolution.
        depth: Blocks at half resolution.
    """

    def __init__(self, past: int, future: int, width: int, depth: int):
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.embed = nn.Conv2d(past + future, width, 3, padding=1)
        self.first = GatedBlock(width, width)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.blocks = nn.ModuleList(GatedBlock(2 * width, width) for _ in range(depth))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.last = GatedBlock(width, width)
        self.head = nn.Sequential(nn.GroupNorm(8, width), nn.Conv2d(width, future, 3, padding=1))

    def forward(self, past: Tensor, noised: Tensor, timestep: Tensor) -> Tensor:
        """Map [B, past, h, w], [B, future, h, w] and time steps [B] to [B, future, h, w]."""
        time = self.time_embed(timestep)
        fine = self.first(self.embed(torch.cat([past, noised], dim=1)), time)
        x = self.down(fine)
        for block in self.blocks:
            x = block(x, time)
        return self.head(self.last(fine + self.up(x), time))


class LatentVideoModel(nn.Module):
    """Frames seen [B, C, T, H, W] with values from 0 to 1 -> the frames that follow, [B, C, horizon, H, W].

    Args:
        config: Sizes and noise.
        channels: Color channels C.
        num_frames: Frames seen, T.
        num_target_frames: Frames predicted at once.
    """

    alphas: Tensor

    def __init__(self, config: LatentConfig, channels: int, num_frames: int, num_target_frames: int):
        super().__init__()
        self.config, self.horizon = config, num_target_frames
        self.is_stochastic = config.mean_fraction < 1
        self.codec = FrameCodec(channels, config.channels, config.codec_width)
        past, future = num_frames * config.channels, num_target_frames * config.channels
        self.predictor = LatentPredictor(past, future, config.width, config.depth)
        alphas = noise_alphas(config.noise_schedule, config.noise_steps)
        self.register_buffer("alphas", alphas.float(), persistent=False)

    def trained(self) -> nn.Module:
        """What a checkpoint keeps."""
        return self

    def forward(self, seen: Tensor, draw: int | None = None) -> Tensor:
        """Predict frames: the decoded mean if `draw` is None, else the sample of that number."""
        past = self.encode(seen)
        latents = self.sample(past, draw) if self.is_stochastic and draw is not None else self.predict_mean(past)
        return self.decode(latents).sigmoid()

    def encode(self, frames: Tensor) -> Tensor:
        """Encode frames [B, C, T, H, W] to [B, T * D, h, w]."""
        latents = self.codec.encode(rearrange(frames, "B C T H W -> (B T) C H W"))
        return rearrange(latents, "(B T) D h w -> B (T D) h w", B=len(frames))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, T * D, h, w] to logits of frames [B, C, T, H, W]."""
        frames = self.codec.decode(rearrange(latents, "B (T D) h w -> (B T) D h w", D=self.config.channels))
        return rearrange(frames, "(B T) C H W -> B C T H W", B=len(latents))

    def estimate(self, past: Tensor, noised: Tensor, timestep: Tensor) -> Tensor:
        """Estimate the clean future latents from the past ones and the future at noise levels `timestep` [B].

        The predictor gets the best linear guess, sqrt(alpha) * noised: nothing, where there is nothing but noise.
        """
        return self.predictor(past, self.alphas[timestep].sqrt()[:, None, None, None] * noised, timestep)

    def predict_mean(self, past: Tensor) -> Tensor:
        """Estimate the mean of the future latents."""
        B, _, h, w = past.shape
        nothing = past.new_zeros(B, self.horizon * self.config.channels, h, w)
        return self.estimate(past, nothing, self._timesteps(past, -1))

    @torch.no_grad()
    def sample(self, past: Tensor, draw: int) -> Tensor:
        """Sample the future latents with DDIM, from noise that depends on the number and the place in the batch."""
        B, _, h, w = past.shape
        generator = torch_generator("latent sample", draw, device=past.device)
        shape = (B, self.horizon * self.config.channels, h, w)
        x = torch.randn(shape, generator=generator, device=past.device, dtype=past.dtype)
        steps = torch.linspace(self.config.noise_steps - 1, 0, self.config.sampling_steps).round().long().tolist()
        for current, following in zip(steps, [*steps[1:], None], strict=True):
            clean = self.estimate(past, x, self._timesteps(past, current))
            if following is not None:
                x = ddim_step(x, clean, self.alphas[current], self.alphas[following])
        return clean

    def noise_shape(self, seen: Tensor) -> tuple[int, ...]:
        """Return the shape of the future latents of one clip [horizon * D, h, w]."""
        h, w = (side // self.codec.STRIDE for side in seen.shape[-2:])
        return self.horizon * self.config.channels, h, w

    def noise_step(self, position: float) -> int:
        """Return the time step for a uniform random number in [0, 1): the last one for `mean_fraction` of them."""
        last = self.config.noise_steps - 1
        random_part = 1 - self.config.mean_fraction
        return last if position >= random_part else int(position / random_part * self.config.noise_steps)

    def _timesteps(self, past: Tensor, step: int) -> Tensor:
        return torch.full((len(past),), step % self.config.noise_steps, device=past.device)

    def losses(self, seen: Tensor, future: Tensor, noise: Tensor, timestep: Tensor, blur: Tensor) -> dict[str, Tensor]:
        """Compute the losses of encoder and decoder (`loss_pixels`) and of the predictor (`loss_latents`, and
        `loss_painted` after the decoder). The encoder learns from the first alone: it could make its latents easy to
        predict by giving up detail.

        Args:
            seen: Frames seen [B, C, T, H, W].
            future: Frames that follow [B, C, horizon, H, W].
            noise: Gaussian noise like the future latents [B, horizon * D, h, w].
            timestep: Noise levels [B].
            blur: Gaussian noise like `noise`, for the decoder.
        """
        with torch.no_grad():
            past = self.encode(seen)
        latents = self.encode(future)
        pixels = F.binary_cross_entropy_with_logits(self.decode(latents + self.config.blur * blur).float(), future)
        target = latents.detach()
        alpha = self.alphas[timestep, None, None, None]
        clean = self.estimate(past, alpha.sqrt() * target + (1 - alpha).sqrt() * noise, timestep)
        painted = F.binary_cross_entropy_with_logits(self.decode(clean).float(), future)
        return {
            "loss_pixels": pixels,
            "loss_latents": F.mse_loss(clean.float(), target.float()),
            "loss_painted": painted,
        }
