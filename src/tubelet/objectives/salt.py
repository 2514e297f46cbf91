"""SALT: predict a frozen teacher's features at hidden positions (Li et al. 2025, arXiv:2509.24317), or distill it.

With `context_coeff`, at visible positions, too: the distillation of V-JEPA 2.1 (arXiv:2603.14482).
"""

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tubelet.config import RESUME_IGNORED
from tubelet.data import NORMALIZATION, Batch, to_float
from tubelet.grid import ClipShape, Grid
from tubelet.models import PredictorOptions
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.objectives import Setup
from tubelet.objectives.losses.dense import DenseOptions, context_loss
from tubelet.objectives.losses.hidden_features import (
    hidden_features,
    normed_features,
    predict,
    prediction_error,
    take_tokens,
)
from tubelet.probing.encoder import fingerprint, normalization, read_encoder
from tubelet.probing.options import PretrainConfig
from tubelet.report.curves import Curves
from tubelet.runtime.checkpoint import CheckpointError
from tubelet.training.objective import Objective, StepRng, ema_update

TEACHER = "objective.teacher"

CURVES = (
    Curves(
        "loss",
        "Loss",
        "",
        {"loss": "total", "loss_jepa": "prediction of hidden tokens", "loss_context": "prediction of visible tokens"},
        "Error of the predicted teacher features; with `context_coeff`, the total contains that of the visible tokens "
        "times its coefficient, and rises with it during the ramp. Look for: errors that fall. The targets are fixed, "
        "so the errors of all steps, and of runs with the same teacher, can be compared, and they cannot fall by "
        "collapse.",
        smooth=True,
    ),
)
REMEDIES = ("probe the teacher: objective.teacher may itself have collapsed",)


class Options(DenseOptions):
    """YAML section `objective` with `name: salt`."""

    name: str = "salt"
    teacher: Annotated[PretrainConfig, RESUME_IGNORED]  # its weights are compared instead
    """Frozen encoder whose features are predicted, as the section `pretrain` of a probe: `{folder: runs/stage1}`."""
    predictor: PredictorOptions = Field({}, validate_default=True)
    """Predictor: mask tokens, or with `use_mask_tokens: false` diffusion-noised targets."""
    context_coeff: float = Field(0.0, ge=0)
    """Weight lambda of a loss on visible tokens, as in the distillation of V-JEPA 2.1; 0: hidden tokens only."""
    ema: float | None = Field(None, ge=0, lt=1)
    """Momentum of a moving average of the student's weights, which is then the encoder to evaluate, as in the
    distillation of V-JEPA 2.1 (Polyak average); null for none."""


class SALT(Objective):
    """Predicts the features of a frozen teacher at hidden positions from a student's features of the visible tokens.

    The teacher is no part of the checkpoints; these hold its fingerprint.

    Args:
        encoder: The student: any encoder that accepts masks.
        predictor: Maps `(context, target, masks_context, masks_target, mask_index)` to features of the teacher's width;
            with `predict_context` where `options.context_coeff` is not 0.
        teacher: Encoder with the student's token grid.
        options: Loss and moving average.
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
    """

    fixed_targets = True

    def __init__(
        self,
        encoder: Encoder,
        predictor: Predictor,
        teacher: Encoder,
        options: Options,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.encoder, self.predictor = encoder, predictor
        self.teacher = teacher.requires_grad_(False)
        self.ema_encoder = None if options.ema is None else copy.deepcopy(encoder).requires_grad_(False)
        self.options, self.mean, self.std = options, mean, std
        self.train()

    def train(self, mode: bool = True) -> "SALT":
        """Set the training mode; the teacher stays in evaluation mode, without dropout."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute `loss`: the prediction error at the hidden positions of each mask, averaged over the masks.

        With a loss on visible tokens, that error is `loss_jepa`, and `loss` its sum with the weighted `loss_context`.
        """
        o = self.options
        clips = to_float(batch.clips, self.mean, self.std)
        features = normed_features(self.teacher, clips)
        targets = [take_tokens(features, mask) for mask in batch.masks_target]
        contexts = self.encoder(clips, list(batch.masks_context))
        if o.context_coeff == 0:
            predictions = predict(self.predictor, contexts, targets, batch, rng)
            return {"loss": prediction_error(predictions, targets, o.loss_exp)}
        predictions = predict(self.predictor, contexts, targets, batch, rng, return_context=True)
        hidden, visible = ([pair[which] for pair in predictions] for which in (0, 1))
        loss_jepa = prediction_error(hidden, targets, o.loss_exp)
        loss_context = context_loss(visible, features, batch, self.encoder.grid_size(*clips.shape[2:]), o)
        loss = loss_jepa + o.context_weight(rng.step) * loss_context
        return {"loss": loss, "loss_jepa": loss_jepa.detach(), "loss_context": loss_context.detach()}

    def targets(self, clips: Tensor, masks_target: Sequence[Tensor]) -> list[Tensor]:
        """Return the layer-normed features of the teacher at the positions of each mask [B, Kt, D of the teacher]."""
        return hidden_features(self.teacher, clips, masks_target)

    def on_update(self, step: int) -> dict[str, float]:
        """Move the average of the student's weights, if there is one."""
        if self.ema_encoder is not None and self.options.ema is not None:
            ema_update(self.ema_encoder, self.encoder, self.options.ema)
        return {"context_coeff": self.options.context_weight(step)} if self.options.context_coeff > 0 else {}

    def parts(self) -> dict[str, nn.Module]:
        return {**self.encoders(), "predictor": self.predictor}

    def encoders(self) -> dict[str, nn.Module]:
        average = {} if self.ema_encoder is None else {"ema_encoder": self.ema_encoder}
        return {**average, "encoder": self.encoder}

    @functools.cached_property
    def teacher_fingerprint(self) -> str:
        """Hash of the teacher's architecture and weights."""
        return fingerprint(self.teacher)

    def metadata(self) -> dict[str, Any]:
        """Return the hash of the teacher, which checkpoints do not store."""
        return {"teacher": self.teacher_fingerprint}

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        if metadata["teacher"] != self.teacher_fingerprint:
            raise CheckpointError(
                f"{TEACHER} is another encoder, or has other weights, than at the start of this run. Name the "
                f"checkpoint used then with {TEACHER}.checkpoint=…, or choose another folder=…"
            )


def build(options: Options, setup: Setup) -> SALT:
    """Build student and predictor, and load the teacher. Raises ValueError where they do not fit together.

    On the meta device, for a check of the options, no weights are read, and a teacher that does not exist yet, as its
    run is to come first, counts as one like the student.
    """
    num_masks = setup.num_masks(at_least=1)
    encoder = setup.build_encoder(drop_tokens=True)
    on_meta = torch.get_default_device().type == "meta"
    if on_meta and options.teacher.folder is not None and not Path(options.teacher.folder).exists():
        teacher = copy.deepcopy(encoder)
    else:
        teacher = _load_teacher(options.teacher, setup, weights=not on_meta)
        _check_same_tokens(teacher, encoder, setup.clip)
    dense = options.context_coeff > 0
    predictor = setup.build_predictor(
        options.predictor, encoder, num_masks, out_dim=teacher.embed_dim, predict_context=dense
    )
    if not predictor.use_mask_tokens and teacher.embed_dim != encoder.embed_dim:
        raise ValueError(
            "objective.predictor.use_mask_tokens: noised targets are embedded like the context, but they have "
            f"{teacher.embed_dim} channels ({TEACHER}) and the context {encoder.embed_dim} (encoder): set it to true, "
            "or take an encoder of the teacher's width"
        )
    return SALT(encoder, predictor, teacher, options, mean=setup.mean, std=setup.std)


def _load_teacher(config: PretrainConfig, setup: Setup, weights: bool) -> Encoder:
    """Load the teacher; without `weights`, build its architecture. Raises ValueError where it does not fit the clips.

    The initial weights of student and predictor do not depend on it.
    """
    clip = setup.clip
    ours = dict(zip(NORMALIZATION, (tuple(setup.mean), tuple(setup.std)), strict=True))
    theirs = normalization(config, TEACHER)
    if different := [f"data_aug.{name}={list(value)}" for name, value in theirs.items() if value != ours[name]]:
        raise ValueError(f"{TEACHER} was pretrained with other colors: set {', '.join(different)}")
    try:
        with torch.random.fork_rng(devices=[]):
            return read_encoder(config, clip.num_frames, clip.crop_size, section=TEACHER, weights=weights)
    except ValueError as error:
        raise ValueError(f"{TEACHER}: {error}") from None


def _check_same_tokens(teacher: Encoder, encoder: Encoder, clip: ClipShape) -> None:
    """Raise ValueError where the tokens of teacher and student do not cover the same frames and pixels."""
    sizes = clip.num_frames, clip.height, clip.width
    try:
        theirs = teacher.grid_size(*sizes)
    except ValueError as error:
        raise ValueError(
            f"{TEACHER} cannot encode these clips: {error}. Set data.tubelet_size, data.patch_size, data.num_frames "
            "and data.crop_size as in its pretraining"
        ) from None
    ours = encoder.grid_size(*sizes)
    if theirs != ours:
        raise ValueError(
            f"{TEACHER}: its tokens cover {_token(theirs, clip)} of a clip, those of the encoder {_token(ours, clip)}: "
            "set data.tubelet_size and data.patch_size to the teacher's"
        )


def _token(grid: Grid, clip: ClipShape) -> str:
    sides = (size // count for size, count in zip((clip.num_frames, clip.height, clip.width), grid, strict=True))
    return "{} x {} x {} (frames x pixels)".format(*sides)
