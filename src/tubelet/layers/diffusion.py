"""Diffusion of features: noise schedules, embedded time steps, sampling."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

NoiseSchedule = Literal["cosine", "linear", "vjepa"]


class TimeEmbedding(nn.Module):
    """Embed time steps [B] as [B, dim]: sines and cosines of `dim / 2` frequencies and an MLP (Ho et al. 2020)."""

    omega: Tensor

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("omega", 10000.0 ** -(torch.arange(dim // 2, device="cpu") / (dim // 2)), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim // 2 * 2, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        angle = timestep[:, None] * self.omega
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))


def noise_alphas(schedule: NoiseSchedule, steps: int, beta: tuple[float, float] | None = None) -> Tensor:
    """Return the fraction of the target's variance that remains at each time step: the cumulative product of 1 - beta.

    Args:
        schedule: `vjepa` increases beta linearly, by default from 0.5 towards 1 (exclusive) as published, so that after
            some 20 steps nothing of the target remains. `linear` increases it from 1e-4 to 0.02 over 1000 steps (Ho et
            al. 2020), scaled for other numbers of steps. `cosine` is equation 17 of Nichol & Dhariwal 2021.
        steps: Number of time steps.
        beta: First and last beta of `linear` or `vjepa`; the values above if None.

    Returns:
        Float64 tensor [steps].

    Raises:
        ValueError: If the schedule is unknown or does not support this range.
    """
    if beta is not None and (schedule == "cosine" or not 0 < beta[0] <= beta[1] <= 1):
        reason = "not used by the cosine schedule" if schedule == "cosine" else "expected 0 < first <= last <= 1"
        raise ValueError(f"noise_beta {list(beta)}: {reason}; remove it for the default range")
    if schedule == "vjepa":
        first, last = beta or (0.5, 1.0)
        betas = first + torch.arange(steps, dtype=torch.float64, device="cpu") * (last - first) / steps
    elif schedule == "linear":
        first, last = beta or (min(0.1 / steps, 1.0), min(20.0 / steps, 1.0))
        betas = torch.linspace(first, last, steps, dtype=torch.float64, device="cpu")
    elif schedule == "cosine":
        time = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
        level = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()
        betas = (1 - level[1:] / level[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"noise_schedule '{schedule}': expected cosine, linear or vjepa")
    return (1 - betas).cumprod(0)


def ddim_step(
    x: Tensor,
    clean: Tensor,
    alpha: Tensor,
    next_alpha: Tensor,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Take one step of DDIM (Song et al. 2021, equations 12 and 16).

    Args:
        x: Noised sample [...].
        clean: Estimate of the sample without noise [...].
        alpha: Fraction of the variance of `x` that is not noise.
        next_alpha: That of the result; larger.
        eta: Fraction of the standard deviation of DDPM's new noise; 0 for a deterministic step.
        generator: Source of the new noise.
    """
    noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    if eta == 0:
        return next_alpha.sqrt() * clean + (1 - next_alpha).sqrt() * noise
    variance = eta**2 * (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)
    new = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return next_alpha.sqrt() * clean + (1 - next_alpha - variance).clamp_min(0).sqrt() * noise + variance.sqrt() * new
