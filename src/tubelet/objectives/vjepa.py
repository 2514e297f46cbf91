"""V-JEPA: predict an EMA encoder's features at hidden positions (Bardes et al. 2024, arXiv:2404.08471)."""

import copy
import functools
import operator
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from tubelet.config import Pair
from tubelet.data import Batch, to_float
from tubelet.models import PredictorOptions
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.objectives import Setup
from tubelet.objectives.losses.distributed import all_gather_with_grad
from tubelet.objectives.losses.hidden_features import hidden_features, predict, prediction_error
from tubelet.objectives.losses.vicreg import covariance, invariance, variance_hinge
from tubelet.report.curves import Curves
from tubelet.training.objective import Objective, ObjectiveOptions, StepRng, ema_update
from tubelet.training.schedules import linear

CURVES = (
    Curves(
        "loss",
        "Loss",
        "",
        {
            "loss": "total",
            "loss_jepa": "prediction",
            "loss_std": "variance term",
            "loss_inv": "invariance term",
            "loss_cov": "covariance term",
            "loss_reg": "hinge on predictions",
        },
        "Loss terms of V-JEPA. Look for: a prediction loss that falls and then levels off. The loss does not reveal "
        "collapse: features that have all become equal are easy to predict, so a loss near zero is a bad sign. As the "
        "target encoder changes during training, the loss can also rise while the features improve.",
        smooth=True,
    ),
)
REMEDIES = {
    "any": ("raise objective.std_coeff and objective.cov_coeff (1 to 4)", "start objective.ema nearer to 1"),
    **dict.fromkeys(("complete", "drift"), ("lower objective.inv_coeff, if it is above 0",)),
}


class Options(ObjectiveOptions):
    """YAML section `objective` with `name: vjepa`."""

    name: str = "vjepa"
    predictor: PredictorOptions = Field({}, validate_default=True)
    """Predictor: mask tokens, or with `use_mask_tokens: false` diffusion-noised targets."""
    ema: Pair = (0.998, 1.0)
    """Momentum of the target encoder at the first step and at the end of the schedule."""
    loss_exp: float = Field(1.0, gt=0)
    """p of the prediction loss mean(|prediction - target|^p) / p."""
    reg_coeff: float = Field(0.0, ge=0)
    """Weight of V-JEPA's hinge that keeps the predictions' standard deviation over the tokens of a clip above 1."""
    std_coeff: float = Field(0.0, ge=0)
    """Weight of the variance term of VICReg on the mean context features of the clips."""
    std_floor: float = Field(0.5, gt=0)
    """Standard deviation across clips below which the variance term acts."""
    inv_coeff: float = Field(0.0, ge=0)
    """Weight of the invariance term of VICReg: the mean context feature of a clip is the same under each mask."""
    cov_coeff: float = Field(0.0, ge=0)
    """Weight of the covariance term of VICReg on the mean context features of the clips."""

    @field_validator("ema")
    @classmethod
    def _check_momentum(cls, ema: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= momentum <= 1 for momentum in ema):
            raise ValueError(f"momentum lies between 0 and 1, got {list(ema)}")
        return ema

    def check_batch(self, num_clips: int) -> None:
        if num_clips < 2 and (self.std_coeff or self.cov_coeff):
            raise ValueError(
                "objective.std_coeff and objective.cov_coeff compare the clips of a batch, but there is one: "
                "raise data.batch_size, or lower optimization.accumulation_steps"
            )


class VJEPA(Objective):
    """Predicts the features of an EMA target encoder at hidden positions from the features of the visible tokens.

    Args:
        encoder: Any encoder that accepts masks.
        predictor: Maps `(context, target, masks_context, masks_target, mask_index)` to features at the target
            positions.
        options: Loss and momentum.
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
        schedule_steps: Steps over which the momentum goes from `ema[0]` to `ema[1]`.
    """

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        options: Options,
        *,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        schedule_steps: float = 1.0,
    ):
        super().__init__()
        self.encoder = encoder
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = predictor
        self.options, self.mean, self.std, self.schedule_steps = options, mean, std, schedule_steps
        self.train()

    def train(self, mode: bool = True) -> "VJEPA":
        """Set the training mode; target encoders stay in evaluation mode, without dropout."""
        super().train(mode)
        for name, part in self.named_children():
            if name.startswith("target_"):
                part.eval()
        return self

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute `loss` and its terms `loss_jepa`, `loss_reg`, `loss_std`, `loss_inv`, `loss_cov` (those in use)."""
        clips = to_float(batch.clips, self.mean, self.std)
        targets = self.targets(clips, batch.masks_target)
        contexts = self.encoder(clips, list(batch.masks_context))
        predictions = predict(self.predictor, contexts, targets, batch, rng)
        return self.losses(predictions, targets, contexts)

    def targets(self, clips: Tensor, masks_target: Sequence[Tensor]) -> list[Tensor]:
        """Return the layer-normed features of the target encoder at the positions of each mask [B, Kt, D]."""
        return hidden_features(self.target_encoder, clips, masks_target)

    def losses(self, predictions: list[Tensor], targets: list[Tensor], contexts: list[Tensor]) -> dict[str, Tensor]:
        """Compute the loss and its terms, each averaged over the masks."""
        o = self.options
        terms = {"loss_jepa": (1.0, prediction_error(predictions, targets, o.loss_exp))}
        if o.reg_coeff > 0:
            terms["loss_reg"] = (o.reg_coeff, prediction_variance_hinge(predictions))
        if o.std_coeff > 0 or o.cov_coeff > 0:
            clips = all_gather_with_grad(torch.stack([c.mean(1) for c in contexts], dim=1)).unbind(1)
        if o.std_coeff > 0:
            terms["loss_std"] = (o.std_coeff, torch.stack([variance_hinge(c, o.std_floor) for c in clips]).mean(0))
        if o.inv_coeff > 0:
            terms["loss_inv"] = (o.inv_coeff, invariance([c.mean(1) for c in contexts]))
        if o.cov_coeff > 0:
            terms["loss_cov"] = (o.cov_coeff, torch.stack([covariance(c) for c in clips]).mean(0))
        loss = functools.reduce(operator.add, (coefficient * term for coefficient, term in terms.values()))
        return {"loss": loss, **{name: term.detach() for name, (_, term) in terms.items()}}

    def momentum(self, step: int) -> float:
        """Return the EMA momentum after step number `step`, counted from 0."""
        return linear(step, self.schedule_steps, *self.options.ema)

    def on_update(self, step: int) -> dict[str, float]:
        """Move the target encoder towards the encoder."""
        momentum = self.momentum(step)
        ema_update(self.target_encoder, self.encoder, momentum)
        return {"momentum": momentum}

    def parts(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "target_encoder": self.target_encoder, "predictor": self.predictor}

    def encoders(self) -> dict[str, nn.Module]:
        return {"target_encoder": self.target_encoder, "encoder": self.encoder}


def prediction_variance_hinge(predictions: list[Tensor]) -> Tensor:
    """V-JEPA's regularizer: mean hinge below 1 of the predictions' standard deviation over tokens [B, K, D]."""
    deviation = torch.stack([(z.float().var(dim=1) + 1e-4).sqrt() for z in predictions]).mean(0)
    return F.relu(1.0 - deviation).mean()


def check_masks(options: Options, num_masks: int) -> None:
    """Raise ValueError where a term needs more masks."""
    if options.inv_coeff > 0 and num_masks < 2:
        raise ValueError("objective.inv_coeff compares a clip under two masks: add a second entry to `mask`")


def build(options: Options, setup: Setup) -> VJEPA:
    """Build encoder and predictor. Raises ValueError where they do not fit the clips or the masks."""
    num_masks = setup.num_masks(at_least=1)
    check_masks(options, num_masks)
    encoder = setup.build_encoder(drop_tokens=True)
    predictor = setup.build_predictor(options.predictor, encoder, num_masks)
    return VJEPA(encoder, predictor, options, mean=setup.mean, std=setup.std, schedule_steps=setup.schedule_steps)
