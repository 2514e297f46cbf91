"""V-JEPA 2.1: predict several levels of an EMA encoder at hidden and at visible positions (arXiv:2603.14482)."""

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor

from tubelet.config import Pair
from tubelet.data import Batch, to_float
from tubelet.models.interfaces import Encoder
from tubelet.objectives import Setup, vjepa
from tubelet.objectives.losses.dense import DenseOptions, context_loss
from tubelet.objectives.losses.hidden_features import predict, take_tokens
from tubelet.objectives.vjepa import REMEDIES as REMEDIES
from tubelet.objectives.vjepa import VJEPA
from tubelet.report.curves import Curves
from tubelet.training.objective import StepRng

CURVES = (
    Curves(
        "loss",
        "Loss",
        "",
        {
            "loss": "total",
            "loss_jepa": "prediction of hidden tokens",
            "loss_context": "prediction of visible tokens",
            "loss_std": "variance term",
            "loss_inv": "invariance term",
            "loss_cov": "covariance term",
            "loss_reg": "hinge on predictions",
        },
        "Loss terms of V-JEPA 2.1; the total contains the term of the visible tokens times its coefficient, which "
        "rises during the ramp. Look for: prediction losses that fall and then level off. They do not reveal collapse: "
        "features that have all become equal are easy to predict, so losses near zero are a bad sign.",
        smooth=True,
    ),
)


class Options(vjepa.Options, DenseOptions):
    """YAML section `objective` with `name: vjepa2_1`: the options of `vjepa`, and these."""

    name: str = "vjepa2_1"
    ema: Pair = (0.99925, 0.99925)
    levels: PositiveInt = 4
    """Number of the encoder's levels (`encoder.levels`) that are predicted and that the predictor sees."""


class VJEPA21(VJEPA):
    """V-JEPA with a loss on the visible tokens, too, and features of several levels.

    The encoders' tokens after each of L levels, with a normalization layer of their own, are concatenated to width
    L * D. Those of the target encoder are then layer-normed level by level. The predictor embeds those of the context
    encoder with an MLP, and has an output layer each for hidden and visible tokens. The terms on mean features
    (`std_coeff`, `inv_coeff`, `cov_coeff`) read the last level.

    The arguments are those of `VJEPA`.
    """

    options: Options

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute `loss` and its terms: those of `VJEPA` on the hidden tokens, `loss_context` on the visible ones."""
        clips = to_float(batch.clips, self.mean, self.std)
        features = self.target_features(clips)
        targets = [take_tokens(features, mask) for mask in batch.masks_target]
        contexts = self._encode(self.encoder, clips, list(batch.masks_context))
        predictions = predict(self.predictor, contexts, targets, batch, rng, return_context=True)
        hidden, visible = ([pair[which] for pair in predictions] for which in (0, 1))
        losses = self.losses(hidden, targets, [context[..., -self.encoder.embed_dim :] for context in contexts])
        grid = self.encoder.grid_size(*clips.shape[2:])
        loss_context = context_loss(visible, features, batch, grid, self.options)
        losses["loss"] = losses["loss"] + self.options.context_weight(rng.step) * loss_context
        return {**losses, "loss_context": loss_context.detach()}

    @torch.no_grad()
    def target_features(self, clips: Tensor) -> Tensor:
        """Return the target encoder's features of all levels [B, N, L * D], each level layer-normed by itself."""
        features = self._encode(self.target_encoder, clips).unflatten(-1, (self.options.levels, -1))
        return F.layer_norm(features, features.shape[-1:]).flatten(-2)

    def on_update(self, step: int) -> dict[str, float]:
        """Move the target encoder towards the encoder."""
        return {**super().on_update(step), "context_coeff": self.options.context_weight(step)}

    def _encode(self, encoder: Encoder, clips: Tensor, masks: list[Tensor] | None = None) -> Any:
        """Return the tokens of all levels, concatenated; with one level any encoder will do."""
        return encoder(clips, masks, all_levels=True) if self.options.levels > 1 else encoder(clips, masks)


def build(options: Options, setup: Setup) -> VJEPA21:
    """Build encoder and predictor. Raises ValueError where they do not fit the clips, the masks or the levels."""
    num_masks = setup.num_masks(at_least=1)
    vjepa.check_masks(options, num_masks)
    encoder = setup.build_encoder(drop_tokens=True, levels=options.levels)
    predictor = setup.build_predictor(
        options.predictor, encoder, num_masks, levels=options.levels, predict_context=True
    )
    return VJEPA21(encoder, predictor, options, mean=setup.mean, std=setup.std, schedule_steps=setup.schedule_steps)
