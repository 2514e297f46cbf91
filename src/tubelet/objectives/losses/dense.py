"""Loss on visible tokens of V-JEPA 2.1 (arXiv:2603.14482), shared by its pretraining and its distillation."""

from collections.abc import Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from tubelet.config import Pair
from tubelet.data import Batch
from tubelet.grid import Grid
from tubelet.layers.coordinates import locate
from tubelet.objectives.losses.hidden_features import prediction_error, take_tokens
from tubelet.training.objective import ObjectiveOptions
from tubelet.training.schedules import linear


class DenseOptions(ObjectiveOptions):
    """Options of objectives that predict features at hidden and at visible positions."""

    loss_exp: float = Field(1.0, gt=0)
    """p of the prediction loss mean(|prediction - target|^p) / p."""
    context_coeff: float = Field(0.5, ge=0)
    """Weight lambda of the loss on visible tokens."""
    context_ramp: Pair | None = (15_000, 30_000)
    """Steps between which the weight rises linearly from 0; null: constant, for runs of less than some 40,000 steps."""
    distance_weighting: bool = True
    """Weight each visible token by 1 / sqrt(distance to the nearest hidden token); false: equally."""

    @field_validator("context_ramp")
    @classmethod
    def _check_ramp(cls, ramp: tuple[float, float] | None) -> tuple[float, float] | None:
        if ramp is not None and not 0 <= ramp[0] <= ramp[1]:
            raise ValueError(f"expected steps 0 <= first <= last, got {list(ramp)}")
        return ramp

    def context_weight(self, step: int) -> float:
        """Return the weight of the loss on visible tokens in step number `step`, counted from 0."""
        if self.context_ramp is None or step >= self.context_ramp[1]:
            return self.context_coeff
        start, end = self.context_ramp
        return linear(max(0.0, step - start), end - start, 0.0, self.context_coeff)


def context_loss(
    predictions: Sequence[Tensor], features: Tensor, batch: Batch, grid: Grid, options: DenseOptions
) -> Tensor:
    """Return the prediction error of the visible tokens, weighted by distance if asked for, averaged over the masks.

    Args:
        predictions: For each mask the predicted features of the visible tokens [B, Kc, D].
        features: Target features of all tokens [B, N, D].
        batch: The masks.
        grid: Token grid of the clips.
        options: Exponent and weighting.
    """
    targets = [take_tokens(features, visible) for visible in batch.masks_context]
    weights = None
    if options.distance_weighting:
        masks = zip(batch.masks_context, batch.masks_target, strict=True)
        weights = [distance_weights(visible, hidden, grid) for visible, hidden in masks]
    return prediction_error(predictions, targets, options.loss_exp, weights)


def distance_weights(visible: Tensor, masked: Tensor, grid: Grid) -> Tensor:
    """Return 1 / sqrt(d) for each visible token, where d is its distance to the nearest masked token.

    Distances are Euclidean, in tokens along time, height and width.

    Args:
        visible: Time-major indices of the visible tokens [B, Kc].
        masked: Time-major indices of the masked tokens [B, Kt]; none of them is visible.
        grid: Token grid (t, h, w).

    Returns:
        Weights [B, Kc] in (0, 1], float32.

    Example:
        >>> distance_weights(torch.tensor([[1, 4]]), torch.tensor([[0]]), Grid(1, 1, 5))
        tensor([[1.0000, 0.5000]])
    """
    a, b = (torch.stack(locate(indices, grid), dim=-1).float() for indices in (visible, masked))
    # Exact for the small whole numbers here, which a matrix product of the positions would not be.
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.amin(-1).rsqrt()
