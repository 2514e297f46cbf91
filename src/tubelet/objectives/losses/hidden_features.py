"""Prediction of the features at hidden positions, shared by V-JEPA and the objectives that follow it."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.data import Batch
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.models.sound import SoundEncoder
from tubelet.runtime.seeds import seed_for
from tubelet.training.objective import StepRng


@torch.no_grad()
def normed_features(encoder: Encoder | SoundEncoder, clips: Tensor) -> Tensor:
    """Encode whole clips [B, C, T, H, W] and return the layer-normed features of all tokens [B, N, D]."""
    features = encoder(clips)
    return F.layer_norm(features, features.shape[-1:])


def hidden_features(encoder: Encoder | SoundEncoder, clips: Tensor, masks_target: Sequence[Tensor]) -> list[Tensor]:
    """Encode whole clips [B, C, T, H, W], or sound, and return the layer-normed features at the masks' positions.

    Args:
        encoder: The encoder whose features are the targets.
        clips: Normalized clips.
        masks_target: Indices of the hidden tokens, [B, Kt] for each mask.

    Returns:
        Features [B, Kt, D] for each mask, without gradients.
    """
    features = normed_features(encoder, clips)
    return [take_tokens(features, mask) for mask in masks_target]


def take_tokens(features: Tensor, mask: Tensor) -> Tensor:
    """Return the features [B, N, D] at the indices [B, K]: [B, K, D]."""
    return features.gather(1, mask.unsqueeze(-1).expand(-1, -1, features.shape[-1]))


def predict(
    predictor: Predictor,
    contexts: Sequence[Tensor],
    targets: Sequence[Tensor] | None,
    batch: Batch,
    rng: StepRng,
    **arguments: Any,
) -> list[Any]:
    """Predict the features at the hidden positions of each mask.

    Args:
        predictor: With mask tokens, or with noised targets.
        contexts: Features of the visible tokens [B, Kc, D] for each mask.
        targets: True features [B, Kt, D] for each mask; a predictor with mask tokens does not need them.
        batch: Batch whose masks these are.
        rng: Seeds of the noise.
        arguments: Further arguments of the predictor.

    Returns:
        Predictions [B, Kt, D] for each mask, or what `arguments` make the predictor return.
    """
    inputs = [list(contexts), targets, list(batch.masks_context), list(batch.masks_target)]
    noise = {}
    if targets is not None and not predictor.use_mask_tokens:
        noise = _draw_noise(predictor, rng.clip_seeds(batch, "noise"), targets)
    if getattr(predictor, "packs_masks", False):
        return predictor(*inputs, **noise, **arguments)
    of_mask = lambda values, i: None if values is None else values[i]  # noqa: E731
    return [
        predictor(
            *(of_mask(values, index) for values in inputs),
            index,
            **{name: values[index] for name, values in noise.items()},
            **arguments,
        )
        for index in range(len(contexts))
    ]


def prediction_error(
    predictions: Sequence[Tensor], targets: Sequence[Tensor], exponent: float, weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Return mean(|prediction - target|^p) / p, averaged over the masks.

    Args:
        predictions: Predicted features [B, K, D] for each mask.
        targets: True features [B, K, D] for each mask.
        exponent: p.
        weights: Factors of the tokens' errors [B, K] for each mask; 1 if None.
    """
    errors = [(z - h).abs().pow(exponent) for z, h in zip(predictions, targets, strict=True)]
    if weights is not None:
        errors = [error * w.unsqueeze(-1) for error, w in zip(errors, weights, strict=True)]
    return torch.stack([error.mean() / exponent for error in errors]).mean(0)


def _draw_noise(predictor: Predictor, seeds: list[int], targets: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Draw noise and time steps of a diffusion predictor for each mask, clip by clip."""
    draws: dict[str, list[Tensor]] = {"noise": [], "timestep": []}
    for mask_index, target in enumerate(targets):
        shape, device = (target.shape[1], predictor.predictor_embed_dim), target.device
        noise, timestep = [], []
        for seed in seeds:
            generator = torch.Generator(device).manual_seed(seed_for(seed, mask_index))
            timestep.append(torch.randint(predictor.noise_steps, (), generator=generator, device=device))
            noise.append(torch.randn(shape, generator=generator, device=device))
        draws["noise"].append(torch.stack(noise))
        draws["timestep"].append(torch.stack(timestep))
    return draws
