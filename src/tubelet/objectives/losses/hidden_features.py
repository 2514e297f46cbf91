"""Prediction of the features at hidden positions, shared by V-JEPA and the objectives that follow it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.data import Batch
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.runtime.seeds import seed_for
from tubelet.training.objective import StepRng


@torch.no_grad()
def hidden_features(encoder: Encoder, clips: Tensor, masks_target: Sequence[Tensor]) -> list[Tensor]:
    """Encode whole clips [B, C, T, H, W] and return the layer-normed features at the positions of each mask.

    Args:
        encoder: The encoder whose features are the targets.
        clips: Normalized clips.
        masks_target: Indices of the hidden tokens, [B, Kt] for each mask.

    Returns:
        Features [B, Kt, D] for each mask, without gradients.
    """
    features = encoder(clips)
    features = F.layer_norm(features, features.shape[-1:])
    return [features.gather(1, mask.unsqueeze(-1).expand(-1, -1, features.shape[-1])) for mask in masks_target]


def predict(
    predictor: Predictor, contexts: Sequence[Tensor], targets: Sequence[Tensor], batch: Batch, rng: StepRng
) -> list[Tensor]:
    """Predict the features at the hidden positions of each mask.

    Args:
        predictor: With mask tokens, or with noised targets.
        contexts: Features of the visible tokens [B, Kc, D] for each mask.
        targets: True features [B, Kt, D] for each mask; a predictor with mask tokens does not read them.
        batch: Batch whose masks these are.
        rng: Seeds of the noise.

    Returns:
        Predictions [B, Kt, D] for each mask.
    """
    seeds = rng.clip_seeds(batch, "noise")
    return [
        predictor(
            context,
            target,
            batch.masks_context[index],
            batch.masks_target[index],
            index,
            **_draw_noise(predictor, seeds, index, target),
        )
        for index, (context, target) in enumerate(zip(contexts, targets, strict=True))
    ]


def prediction_error(predictions: Sequence[Tensor], targets: Sequence[Tensor], exponent: float) -> Tensor:
    """Return mean(|prediction - target|^p) / p, averaged over the masks."""
    errors = [(z - h).abs().pow(exponent).mean() / exponent for z, h in zip(predictions, targets, strict=True)]
    return torch.stack(errors).mean(0)


def _draw_noise(predictor: Predictor, seeds: list[int], mask_index: int, target: Tensor) -> dict[str, Tensor]:
    """Draw noise and time steps of a diffusion predictor clip by clip; nothing for mask tokens."""
    if predictor.use_mask_tokens:
        return {}
    shape = (target.shape[1], predictor.predictor_embed_dim)
    noise, timestep = [], []
    for seed in seeds:
        generator = torch.Generator(target.device).manual_seed(seed_for(seed, mask_index))
        timestep.append(torch.randint(predictor.noise_steps, (), generator=generator, device=target.device))
        noise.append(torch.randn(shape, generator=generator, device=target.device))
    return {"noise": torch.stack(noise), "timestep": torch.stack(timestep)}
