"""From the features of visible tokens to the features at hidden places (V-JEPA, Bardes et al. 2024)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from tubelet.layers import Block
from tubelet.layers.block import run_block
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.positions import Positions, RopePairing

NoiseSchedule = Literal["cosine", "linear", "vjepa"]


class VisionTransformerPredictor(nn.Module):
    """Narrow transformer over the context tokens and one token for each hidden place.

    The hidden places hold a learned *mask token* (`use_mask_tokens`), one for each mask of the configuration, or the
    *noised target*: the target's features in the predictor's width, mixed with Gaussian noise at a time step. With the
    schedules `cosine` and `linear` the predictor is told the time step; `vjepa` is the published variant, which is not.
    `embed_dim` is the encoder's width. The other arguments are those of VisionTransformer. Raises ValueError for sizes
    or noise options that do not go together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 1,
        tubelet_size: int = 2,
        embed_dim: int = 768,
        predictor_embed_dim: int = 384,
        depth: int = 6,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float = 0.02,
        uniform_power: bool = False,
        use_mask_tokens: bool = False,
        num_mask_tokens: int = 2,
        zero_init_mask_tokens: bool = True,
        use_rope: bool = False,
        rope_pairing: RopePairing = "interleaved",
        use_silu: bool = False,
        wide_silu: bool = True,
        use_activation_checkpointing: bool = False,
        noise_schedule: NoiseSchedule = "cosine",
        noise_beta: tuple[float, float] | None = None,
        noise_steps: int = 1000,
    ):
        super().__init__()
        self.predictor_embed_dim = predictor_embed_dim
        self.num_heads = num_heads
        self.use_mask_tokens = use_mask_tokens
        self.noise_steps = noise_steps
        self.use_activation_checkpointing = use_activation_checkpointing

        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        is_video = num_frames > 1
        grid = (num_frames // tubelet_size if is_video else 1, height // patch_size, width // patch_size)
        self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim)
        self.positions = Positions(
            predictor_embed_dim, num_heads, grid, is_video, uniform_power, use_rope, rope_pairing
        )
        self.mask_tokens = self.time_embed = None
        if use_mask_tokens:
            self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, predictor_embed_dim) for _ in range(num_mask_tokens))
        else:
            alphas = noise_alphas(noise_schedule, noise_steps, noise_beta)
            self.register_buffer("alphas", alphas.float(), persistent=False)
            if noise_schedule != "vjepa":
                self.time_embed = TimeEmbedding(predictor_embed_dim)
        self.predictor_blocks = nn.ModuleList(
            Block(
                predictor_embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                drop_rate,
                attn_drop_rate,
                norm_layer=norm_layer,
                use_silu=use_silu,
                wide_silu=wide_silu,
            )
            for _ in range(depth)
        )
        self.predictor_norm = norm_layer(predictor_embed_dim)
        self.predictor_proj = nn.Linear(predictor_embed_dim, embed_dim)
        init_weights(self, init_std)
        rescale_blocks(self.predictor_blocks)
        if use_mask_tokens and not zero_init_mask_tokens:
            for token in self.mask_tokens:
                nn.init.trunc_normal_(token, std=init_std)

    def forward(
        self,
        context: torch.Tensor,
        target: torch.Tensor | None,
        masks_context: torch.Tensor,
        masks_target: torch.Tensor,
        mask_index: int = 0,
        *,
        noise: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features at the hidden places.

        Args:
            context: features of the visible tokens [B, Kc, D].
            target: layer-normed features of the hidden tokens [B, Kt, D]; read only where they are noised.
            masks_context: places of the visible tokens [B, Kc].
            masks_target: places of the hidden tokens [B, Kt].
            mask_index: which mask token stands at the hidden places.
            noise: Gaussian noise in the predictor's width [B, Kt, predictor_embed_dim], and
            timestep: time steps [B] from 0 (nearly clean) to noise_steps - 1; drawn from torch's generator if None.

        Returns:
            Predictions [B, Kt, D].
        """
        if self.use_mask_tokens:
            tokens = self.mask_tokens[mask_index].expand(*masks_target.shape, -1)
            return self._predict(self.predictor_embed(context), tokens, masks_context, masks_target)
        if target is None:
            raise ValueError("the predictor noises its targets: give them, or draw predictions with sample()")
        latent = self._latent(target)
        if noise is None:
            noise = torch.randn_like(latent)
        if timestep is None:
            timestep = torch.randint(self.noise_steps, (len(latent),), device=latent.device)
        alpha = self.alphas[timestep, None, None]
        noised = alpha.sqrt() * latent + (1 - alpha).sqrt() * noise
        return self._denoise(self.predictor_embed(context), noised, timestep, masks_context, masks_target)

    @torch.no_grad()
    def sample(
        self,
        context: torch.Tensor,
        masks_context: torch.Tensor,
        masks_target: torch.Tensor,
        steps: int,
        draws: int = 1,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Hypotheses for the hidden tokens: from noise, denoised in `steps` steps; [draws, B, Kt, D].

        Deterministic DDIM (Song et al. 2021, equation 12 with sigma = 0). The predictor predicts clean features, whose
        image in the predictor's width is the clean latent of the equation. Raises ValueError for a predictor with mask
        tokens, which has one answer only, and for more steps than the schedule has.
        """
        if self.use_mask_tokens:
            raise ValueError("a predictor with mask tokens cannot be sampled; train with model.use_mask_tokens: false")
        if not 1 <= steps <= self.noise_steps:
            raise ValueError(f"steps must be from 1 to the schedule's {self.noise_steps}, not {steps}")
        B, Kt = masks_target.shape
        masks_context, masks_target = masks_context.repeat(draws, 1), masks_target.repeat(draws, 1)
        embedded = self.predictor_embed(context).repeat(draws, 1, 1)
        shape = (draws * B, Kt, self.predictor_embed_dim)
        x = torch.randn(shape, generator=generator, device=context.device, dtype=context.dtype)
        timesteps = torch.linspace(self.noise_steps - 1, 0, steps).round().long().tolist()
        for now, following in zip(timesteps, [*timesteps[1:], None], strict=True):
            timestep = torch.full((draws * B,), now, device=context.device)
            predicted = self._denoise(embedded, x, timestep, masks_context, masks_target)
            if following is not None:
                x = self._ddim(x, self._latent(predicted), self.alphas[now], self.alphas[following])
        return predicted.unflatten(0, (draws, B))

    @staticmethod
    def _ddim(x: torch.Tensor, clean: torch.Tensor, alpha: torch.Tensor, next_alpha: torch.Tensor) -> torch.Tensor:
        noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        return next_alpha.sqrt() * clean + (1 - next_alpha).sqrt() * noise

    def _latent(self, target: torch.Tensor) -> torch.Tensor:
        """Target features in the predictor's width; normed, so that their variance equals the noise's."""
        return F.layer_norm(self.predictor_embed(target), (self.predictor_embed_dim,))

    def _denoise(
        self,
        context: torch.Tensor,
        noised: torch.Tensor,
        timestep: torch.Tensor,
        masks_context: torch.Tensor,
        masks_target: torch.Tensor,
    ) -> torch.Tensor:
        if self.time_embed is not None:
            noised = noised + self.time_embed(timestep)[:, None]
        return self._predict(context, noised, masks_context, masks_target)

    def _predict(
        self, context: torch.Tensor, tokens: torch.Tensor, masks_context: torch.Tensor, masks_target: torch.Tensor
    ) -> torch.Tensor:
        """Features [B, Kt, D] from the embedded context [B, Kc, Dp] and the tokens at the hidden places [B, Kt, Dp]."""
        places = torch.cat([masks_context, masks_target], dim=1)
        x = self.positions.add(torch.cat([context, tokens.type_as(context)], dim=1), places)
        rope = self.positions.rope(places)
        for block in self.predictor_blocks:
            x = run_block(block, x, rope, save_memory=self.use_activation_checkpointing and self.training)
        return self.predictor_proj(self.predictor_norm(x[:, context.shape[1] :]))


class TimeEmbedding(nn.Module):
    """Time steps [B] -> [B, dim]: sines and cosines of `dim / 2` frequencies through a small MLP (Ho et al. 2020)."""

    def __init__(self, dim: int):
        super().__init__()
        self.register_buffer("omega", 10000.0 ** -(torch.arange(dim // 2, device="cpu") / (dim // 2)), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(dim // 2 * 2, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        angle = timestep[:, None] * self.omega
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))


def noise_alphas(schedule: NoiseSchedule, steps: int, beta: tuple[float, float] | None = None) -> torch.Tensor:
    """Share of the target's variance left at every time step: the cumulative product of 1 - beta, float64 [steps].

    `vjepa`: beta rises linearly, by default from 0.5 towards 1 as published, the end itself not included: after some 20
    steps nothing is left of the target. `linear`: from 1e-4 to 0.02 for 1000 steps (Ho et al. 2020), scaled for other
    numbers. `cosine`: Nichol & Dhariwal 2021, equation 17. Raises ValueError for a range that the schedule cannot have.
    """
    if beta is not None and (schedule == "cosine" or not 0 < beta[0] <= beta[1] <= 1):
        reason = "the cosine schedule has none" if schedule == "cosine" else "need 0 < first <= last <= 1"
        raise ValueError(f"noise_beta {list(beta)}: {reason}; leave it out for the usual range")
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
        raise ValueError(f"noise_schedule '{schedule}': take cosine, linear or vjepa")
    return (1 - betas).cumprod(0)
