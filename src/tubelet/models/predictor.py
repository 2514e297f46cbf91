"""Predictor of V-JEPA (Bardes et al. 2024): features of masked tokens from the features of visible tokens."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from tubelet.grid import ClipShape
from tubelet.layers import Block
from tubelet.layers.block import run_block
from tubelet.layers.diffusion import NoiseSchedule, TimeEmbedding, ddim_step, noise_alphas
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.joint_positions import JointPositions
from tubelet.layers.positions import Positions
from tubelet.layers.rope import RopePairing
from tubelet.layers.segments import attend_in_segments, join
from tubelet.models.interfaces import Predictor

PURE_NOISE = 1e-6
"""Fraction of the target's variance below which nothing of the target can be seen."""


class VisionTransformerPredictor(Predictor):
    """Narrow transformer over the context tokens and one token for each masked position.

    The input at a masked position is either a learned mask token (`use_mask_tokens`), with a separate one for each mask
    of the configuration, or the noised target: the target features projected to the width of the predictor and mixed
    with Gaussian noise of a random time step.

    Args:
        img_size: Frame size in pixels: the side of a square or (height, width).
        patch_size: Side of a patch in pixels.
        num_frames: Frames per clip; 1 for images.
        tubelet_size: Frames per token.
        embed_dim: Width D of the encoder.
        predictor_embed_dim: Width of the predictor.
        depth: Number of transformer blocks.
        num_heads: Attention heads per block; must divide `predictor_embed_dim`.
        mlp_ratio: Hidden width of the MLP divided by `predictor_embed_dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        qk_scale: Factor of the attention logits; 1 / sqrt(head width) if None.
        drop_rate: Dropout probability after attention projections and in MLPs.
        attn_drop_rate: Dropout probability of the attention weights.
        norm_layer: Factory of the normalization layers, called with `predictor_embed_dim`.
        init_std: Standard deviation of the initial weights (truncated normal).
        uniform_power: Give time, row and column a third of the channels of the sin-cos position embeddings each;
            by default they get 1/2, 1/4 and 1/4.
        use_mask_tokens: Use learned mask tokens; noised targets otherwise.
        num_mask_tokens: Number of mask tokens, one for each mask of the configuration.
        zero_init_mask_tokens: Initialize mask tokens with zeros; with truncated normal noise otherwise.
        use_rope: Use rotary positions instead of sin-cos position embeddings.
        rope_pairing: Rotary frequencies: `interleaved` as in RoFormer, or `vjepa2` for released weights of V-JEPA 2.
        rope_extent: Spread the rotary positions of rows and columns evenly over 0 to rope_extent - 1, as the encoder.
        use_silu: Use SwiGLU feed-forward layers instead of MLPs.
        wide_silu: Reduce the hidden width of SwiGLU to 2/3, so that it has as many parameters as the MLP.
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.
        depth_scaled_init: Divide the output projections of block l by sqrt(2 l), as in BEiT.
        noise_schedule: Noise levels of noised targets. `vjepa` is the published schedule, whose predictor does not
            receive the time step; with `cosine` and `linear` it does.
        noise_beta: First and last noise rate of the `linear` or `vjepa` schedule; the usual range if None.
        noise_steps: Number of time steps of the schedule.
        out_dim: Width of the output; that of the input if None.
        levels: Number of levels of the encoder whose tokens are the input, concatenated to width `levels * embed_dim`.
            An MLP embeds them if there are several (V-JEPA 2.1).
        predict_context: Add a second output layer, for the features of the visible tokens (V-JEPA 2.1).

    Raises:
        ValueError: If sizes or noise options are incompatible.
    """

    packs_masks = True
    use_mask_tokens: bool = True
    alphas: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 1,
        tubelet_size: int = 2,
        embed_dim: PositiveInt = 768,
        predictor_embed_dim: PositiveInt = 384,
        depth: PositiveInt = 6,
        num_heads: PositiveInt = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: PositiveFloat = 0.02,
        uniform_power: bool = True,
        use_mask_tokens: bool = False,
        num_mask_tokens: PositiveInt = 2,
        zero_init_mask_tokens: bool = True,
        use_rope: bool = False,
        rope_pairing: RopePairing = "interleaved",
        use_silu: bool = False,
        wide_silu: bool = True,
        use_activation_checkpointing: bool = False,
        depth_scaled_init: bool = True,
        noise_schedule: NoiseSchedule = "cosine",
        noise_beta: tuple[float, float] | None = None,
        noise_steps: PositiveInt = 1000,
        out_dim: int | None = None,
        levels: PositiveInt = 1,
        predict_context: bool = False,
        rope_extent: PositiveInt | None = None,
    ):
        super().__init__()
        self.levels = levels
        self.predict_context = predict_context
        self.predictor_embed_dim = predictor_embed_dim
        self.num_heads = num_heads
        self.use_mask_tokens = use_mask_tokens
        self.noise_steps = noise_steps
        self.use_activation_checkpointing = use_activation_checkpointing

        is_video = num_frames > 1
        grid = ClipShape(num_frames, img_size, patch_size, tubelet_size).grid
        self.predictor_embed: nn.Module
        if levels == 1:
            self.predictor_embed = nn.Linear(embed_dim, predictor_embed_dim)
        else:
            self.predictor_embed = nn.Sequential(
                nn.Linear(levels * embed_dim, embed_dim),
                nn.SiLU() if use_silu else nn.GELU(),
                nn.Linear(embed_dim, predictor_embed_dim),
            )
        self.positions: Positions | JointPositions = Positions(
            predictor_embed_dim, num_heads, grid, is_video, uniform_power, use_rope, rope_pairing, rope_extent
        )
        self.mask_tokens: nn.ParameterList | None = None
        self.time_embed: TimeEmbedding | None = None
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
        out_dim = out_dim or levels * embed_dim
        self.predictor_proj = nn.Linear(predictor_embed_dim, out_dim)
        if predict_context:
            self.predictor_proj_context = nn.Linear(predictor_embed_dim, out_dim)
        init_weights(self, init_std)
        if depth_scaled_init:
            rescale_blocks(self.predictor_blocks)
        if self.mask_tokens is not None and not zero_init_mask_tokens:
            for token in self.mask_tokens:
                nn.init.trunc_normal_(token, std=init_std)

    def forward(
        self,
        context: Tensor | list[Tensor],
        target: Tensor | list[Tensor] | None,
        masks_context: Tensor | list[Tensor],
        masks_target: Tensor | list[Tensor],
        mask_index: int = 0,
        *,
        noise: Tensor | list[Tensor] | None = None,
        timestep: Tensor | list[Tensor] | None = None,
        return_context: bool = False,
    ) -> Any:
        """Predict the features of masked tokens, for one mask or, with lists of tensors, for several masks at once.

        The width D of inputs and outputs is that of all levels together. The tokens of all masks form one sequence, see
        `tubelet.layers.segments`.

        Args:
            context: Features of the visible tokens [B, Kc, D].
            target: Layer-normalized features of the masked tokens [B, Kt, D]; not used with mask tokens.
            masks_context: Indices of the visible tokens [B, Kc].
            masks_target: Indices of the masked tokens [B, Kt].
            mask_index: Index of the mask token to use; of the first mask of a list.
            noise: Gaussian noise [B, Kt, predictor_embed_dim]; drawn from torch's default generator if None.
            timestep: Time steps [B] from 0 (nearly clean) to noise_steps - 1; drawn from torch's default generator if
                None.
            return_context: Predict the features of the visible tokens, too; needs `predict_context`.

        Returns:
            Predicted features [B, Kt, D]; with `return_context` a pair of these and those of the visible tokens
            [B, Kc, D]. A list of these for lists.
        """
        is_single = isinstance(masks_context, Tensor)
        count = 1 if is_single else len(masks_context)
        given = (context, target, masks_context, masks_target, noise, timestep)
        contexts, targets, seen, hidden, noises, timesteps = (_of_masks(value, count) for value in given)
        masked = [
            self._masked_tokens(target, mask, mask_index + i, noise, timestep)
            for i, (target, mask, noise, timestep) in enumerate(zip(targets, hidden, noises, timesteps, strict=True))
        ]
        visible = self._split(self.predictor_embed(join(contexts)), seen)
        tokens = self._run(visible, masked, seen, hidden)
        predictions: list[Any] = self._split(self.predictor_proj(join(tokens[1::2])), hidden)
        if return_context:
            of_visible = self._split(self.predictor_proj_context(join(tokens[::2])), seen)
            predictions = list(zip(predictions, of_visible, strict=True))
        return predictions[0] if is_single else predictions

    @torch.no_grad()
    def sample(
        self,
        context: Tensor,
        masks_context: Tensor,
        masks_target: Tensor,
        steps: int,
        draws: int = 1,
        generator: torch.Generator | None = None,
        eta: float = 0.0,
    ) -> Tensor:
        """Sample features of the masked tokens with DDIM (Song et al. 2021, equations 12 and 16).

        Training adds the noise to the latent: the target's projection to the width of the predictor, normalized. The
        predictor estimates the clean features from it, and the latent of its estimate is the clean sample of the
        equations. A sample is the estimate of the last step, from a nearly clean latent. What the projection drops is
        therefore estimated, not sampled, and as the estimate minimizes an L1 or L2 error and is normalized again, the
        samples need not have the distribution of the targets; `evals/predictor_calibration` measures whether they do.

        Args:
            context: Features of the visible tokens [B, Kc, D].
            masks_context: Indices of the visible tokens [B, Kc].
            masks_target: Indices of the masked tokens [B, Kt].
            steps: Number of denoising steps. They are evenly spaced over the schedule; where the predictor is not told
                the time step, over the part of it that is not pure noise, and there are at most as many.
            draws: Number of samples.
            generator: Source of the noise; torch's default generator if None.
            eta: 0 for deterministic steps from the initial noise, 1 for ancestral sampling, which adds new noise in
                each step as DDPM does (Ho et al. 2020).

        Returns:
            Sampled features [draws, B, Kt, D].

        Raises:
            ValueError: If the predictor uses mask tokens and therefore is deterministic, or the schedule has fewer
                steps.
        """
        if self.use_mask_tokens:
            raise ValueError("a predictor with mask tokens cannot be sampled; pretrain with use_mask_tokens: false")
        if not 1 <= steps <= self.noise_steps:
            raise ValueError(f"steps must be between 1 and noise_steps ({self.noise_steps}), not {steps}")
        B, Kt = masks_target.shape
        masks_context, masks_target = masks_context.repeat(draws, 1), masks_target.repeat(draws, 1)
        embedded = self.predictor_embed(context).repeat(draws, 1, 1)
        shape = (draws * B, Kt, self.predictor_embed_dim)
        x = torch.randn(shape, generator=generator, device=context.device, dtype=context.dtype)
        timesteps = self._sampling_timesteps(steps)
        for current, following in zip(timesteps, [*timesteps[1:], None], strict=True):
            timestep = torch.full((draws * B,), current, device=context.device)
            predicted = self._denoise(embedded, x, timestep, masks_context, masks_target)
            if following is not None:
                alpha, next_alpha = self.alphas[current], self.alphas[following]
                x = ddim_step(x, self._latent(predicted), alpha, next_alpha, eta, generator)
        return predicted.unflatten(0, (draws, B))

    def _sampling_timesteps(self, steps: int) -> list[int]:
        """Return decreasing time steps, evenly spaced."""
        count = self.noise_steps
        if self.time_embed is None:  # these steps are all the same to the predictor
            count = max(1, int((self.alphas > PURE_NOISE).sum()))
        return torch.linspace(count - 1, 0, min(steps, count)).round().long().tolist()

    def _masked_tokens(
        self,
        target: Tensor | None,
        masks_target: Tensor,
        mask_index: int,
        noise: Tensor | None,
        timestep: Tensor | None,
    ) -> Tensor:
        """Return the inputs at the masked positions [B, Kt, Dp]; arguments as for `forward`."""
        if self.mask_tokens is not None:
            return self.mask_tokens[mask_index].expand(*masks_target.shape, -1)
        if target is None:
            raise ValueError("this predictor noises its targets: pass `target`, or use sample() to draw predictions")
        latent = self._latent(target)
        if noise is None:
            noise = torch.randn_like(latent)
        if timestep is None:
            timestep = torch.randint(self.noise_steps, (len(latent),), device=latent.device)
        alpha = self.alphas[timestep, None, None]
        return self._with_time(alpha.sqrt() * latent + (1 - alpha).sqrt() * noise, timestep)

    def _latent(self, target: Tensor) -> Tensor:
        """Project target features to the width of the predictor, normalized to the variance of the noise."""
        return F.layer_norm(self.predictor_embed(target), (self.predictor_embed_dim,))

    def _denoise(
        self,
        context: Tensor,
        noised: Tensor,
        timestep: Tensor,
        masks_context: Tensor,
        masks_target: Tensor,
    ) -> Tensor:
        tokens = self._run([context], [self._with_time(noised, timestep)], [masks_context], [masks_target])
        return self.predictor_proj(tokens[1])

    def _with_time(self, noised: Tensor, timestep: Tensor) -> Tensor:
        """Add the embedding of the time step, which the published schedule does without."""
        return noised if self.time_embed is None else noised + self.time_embed(timestep)[:, None]

    def _run(
        self,
        contexts: Sequence[Tensor],
        masked: Sequence[Tensor],
        masks_context: Sequence[Tensor],
        masks_target: Sequence[Tensor],
    ) -> list[Tensor]:
        """Run the blocks on the embedded context [B, Kc, Dp] and the masked tokens [B, Kt, Dp] of each mask.

        Returns:
            The normalized tokens in the same shapes: context, masked, context of the second mask, ...
        """
        masks = [mask for pair in zip(masks_context, masks_target, strict=True) for mask in pair]
        tokens = [x for c, m in zip(contexts, masked, strict=True) for x in (c, m.type_as(c))]
        indices = join(masks)
        x = self.positions.add(join(tokens), indices)
        rope = self.positions.rope(indices)
        lengths = [c.shape[1] + t.shape[1] for c, t in zip(masks_context, masks_target, strict=True)]
        attend = attend_in_segments(lengths, [F.scaled_dot_product_attention] * len(lengths), x)
        for block in self.predictor_blocks:
            x = run_block(block, x, rope, attend, use_checkpoint=self.use_activation_checkpointing and self.training)
        return self._split(self.predictor_norm(x), masks)

    @staticmethod
    def _split(x: Tensor, masks: Sequence[Tensor]) -> list[Tensor]:
        """Split joined tokens [B, sum of K_i, D] into those of each mask [B, K_i]."""
        return list(x.split([mask.shape[1] for mask in masks], dim=1))


def _of_masks(value: Tensor | list[Tensor] | None, count: int) -> list[Any]:
    """Return an argument of the predictor as a list with an entry for each mask."""
    if isinstance(value, list):
        return value
    return [value] * count


# The predictor of configurations; V-JEPA's sizes.
vision_transformer_predictor = partial(
    VisionTransformerPredictor, depth=12, use_mask_tokens=True, norm_layer=partial(nn.LayerNorm, eps=1e-6)
)
