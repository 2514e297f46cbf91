"""Masked latent prediction without heuristics: V-JEPA's task (arXiv:2404.08471) with SIGReg (arXiv:2511.08544).

One encoder computes the context and the targets. There is no EMA, no stop-gradient and no normalization of the targets:
SIGReg gives them zero mean and unit variance in all directions, which also prevents collapse.
"""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from tubelet.data import Batch, to_float
from tubelet.models import PredictorOptions
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.objectives import Setup
from tubelet.objectives.losses.hidden_features import predict, take_tokens
from tubelet.objectives.losses.projector import Projector
from tubelet.objectives.losses.sigreg import SIGRegOptions, sigreg
from tubelet.report.curves import Curves
from tubelet.runtime.seeds import torch_generator
from tubelet.training.objective import Objective, ObjectiveOptions, StepRng

CURVES = (
    Curves(
        "loss",
        "Loss",
        "",
        {
            "loss": "total",
            "loss_pred": "prediction",
            "loss_sigreg": "SIGReg",
            "loss_inv": "invariance term",
            "loss_clip_sigreg": "SIGReg of the clips",
        },
        "Loss terms. Look for: SIGReg that falls to about 1, its value for normally distributed projections (with "
        "`sigreg.times_batch`), and a prediction loss below 1, the variance of the targets. A prediction loss near "
        "zero with a SIGReg that stays high is collapse.",
        smooth=True,
    ),
)
REMEDIES = (
    "raise objective.sigreg_coeff (2 to 10 times)",
    "raise data.batch_size",
)


class Options(ObjectiveOptions):
    """YAML section `objective` with `name: lejepa`."""

    name: str = "lejepa"
    predictor: PredictorOptions = Field({}, validate_default=True)
    """Predictor with mask tokens."""
    projector_hidden_dim: int = Field(2048, ge=1)
    """Width of the hidden layers of the projector."""
    projector_dim: int = Field(256, ge=1)
    """Width of the projections of the tokens, which are predicted."""
    sigreg_coeff: float = Field(0.02, ge=0)
    """Weight of SIGReg; that of the prediction loss is 1."""
    sigreg: SIGRegOptions = SIGRegOptions()
    sigreg_tokens: int = Field(4, ge=1)
    """Positions in the clip, drawn at random in each step, at which SIGReg compares the clips."""
    inv_coeff: float = Field(0.0, ge=0)
    """Weight of LeJEPA's invariance term, with the masks as views: the projection of the mean context feature of a clip
    is the same under each mask. SIGReg acts on these projections, too. Needs two masks."""
    stop_gradient: bool = False
    """Send no gradient of the prediction loss through the targets, as an ablation."""

    def check_batch(self, num_clips: int) -> None:
        self.sigreg.check_batch(num_clips)


class LeJEPA(Objective):
    """Predicts the projected features of the full clip at hidden positions from the features of the visible tokens.

    SIGReg is computed at each of a few positions over the clips, not over all tokens together: features that depend on
    the position alone, which a predictor can guess, are then not normal.

    With gradient accumulation, SIGReg and the projector's batch norm see the clips of a part in all processes.

    Args:
        encoder: Any encoder that accepts masks.
        predictor: Maps `(context, None, masks_context, masks_target, mask_index)` to projections at the target
            positions.
        options: Loss.
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
    """

    def __init__(
        self, encoder: Encoder, predictor: Predictor, options: Options, *, mean: Sequence[float], std: Sequence[float]
    ):
        super().__init__()
        self.encoder, self.predictor, self.options, self.mean, self.std = encoder, predictor, options, mean, std
        sizes = (encoder.embed_dim, options.projector_hidden_dim, options.projector_dim)
        self.projector = Projector(*sizes)
        if options.inv_coeff:
            self.clip_projector = Projector(*sizes)

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute the error of the predictions, averaged over the masks, SIGReg and the invariance term."""
        o = self.options
        clips = to_float(batch.clips, self.mean, self.std)
        projections = self.projector(self.encoder(clips)).float()  # [B, N, P]
        targets = projections.detach() if o.stop_gradient else projections
        contexts = self.encoder(clips, list(batch.masks_context))
        predictions = predict(self.predictor, contexts, None, batch, rng)
        errors = [
            (predicted.float() - take_tokens(targets, mask)).square().mean()
            for predicted, mask in zip(predictions, batch.masks_target, strict=True)
        ]
        prediction = torch.stack(errors).mean(0)
        gauss = sigreg(projections[:, self.positions(projections, rng)].transpose(0, 1), rng, o.sigreg)
        loss, terms = prediction + o.sigreg_coeff * gauss, {"loss_pred": prediction, "loss_sigreg": gauss}
        if o.inv_coeff:
            views = self.clip_projector(torch.stack([context.mean(1) for context in contexts])).float()  # [M, B, P]
            inv, clip_gauss = (views - views.mean(0)).square().mean(), sigreg(views, rng, o.sigreg)
            loss = loss + o.inv_coeff * (inv + o.sigreg_coeff * clip_gauss)
            terms |= {"loss_inv": inv, "loss_clip_sigreg": clip_gauss}
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    def positions(self, tokens: Tensor, rng: StepRng) -> Tensor:
        """Draw the positions [sigreg_tokens] of a step among those of the tokens [B, N, P]."""
        generator = torch_generator(rng.seed, rng.step, "sigreg positions", device=tokens.device)
        order = torch.randperm(tokens.shape[1], generator=generator, device=tokens.device)
        return order[: self.options.sigreg_tokens]

    def encoders(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}


def build(options: Options, setup: Setup) -> LeJEPA:
    """Build encoder, projector and predictor. Raises ValueError where they do not fit the clips or the masks."""
    num_masks = setup.num_masks(at_least=2 if options.inv_coeff else 1)
    encoder = setup.build_encoder(drop_tokens=True)
    predictor = setup.build_predictor(options.predictor, encoder, num_masks, out_dim=options.projector_dim)
    if not predictor.use_mask_tokens:
        raise ValueError("objective.predictor.use_mask_tokens: noised targets work with objective.name: vjepa only")
    return LeJEPA(encoder, predictor, options, mean=setup.mean, std=setup.std)
