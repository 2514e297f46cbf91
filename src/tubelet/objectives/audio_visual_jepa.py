"""V-JEPA of videos with sound: predict features at hidden positions of both from what is seen and heard of both."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from tubelet.data import Batch, to_float
from tubelet.grid import SoundShape
from tubelet.layers.joint_positions import JointPositions
from tubelet.masks import MaskOptions, MaskSampler, build_collator
from tubelet.models import EncoderOptions
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.sound import SoundEncoder, SpectrogramConfig, build_sound_encoder, spectrogram_shape
from tubelet.objectives import Setup, vjepa
from tubelet.objectives.losses.hidden_features import hidden_features, predict
from tubelet.objectives.vjepa import REMEDIES as REMEDIES
from tubelet.objectives.vjepa import VJEPA
from tubelet.report.curves import Curves
from tubelet.training.objective import StepRng, ema_update

CURVES = (
    *vjepa.CURVES,
    Curves(
        "modalities",
        "Loss of each modality",
        "",
        {"loss_video": "video", "loss_sound": "sound"},
        "Total loss of each modality. Look for: both fall and then level off.",
        smooth=True,
    ),
    Curves(
        "spread",
        "Spread of the target features",
        "",
        {"spread_video": "video", "spread_sound": "sound"},
        "Standard deviation over the clips of the batch of the mean of a clip's target features, averaged over the "
        "channels. Look for: values that stay away from 0. Near 0 all clips have the same features: collapse.",
        smooth=True,
    ),
)


class Options(vjepa.Options):
    """YAML section `objective` with `name: audio_visual_jepa`: the options of `vjepa`, and these.

    It needs `data.format: {name: sounding_videos}`.
    """

    name: str = "audio_visual_jepa"
    sound_encoder: EncoderOptions = Field("vit_small", validate_default=True)
    """Encoder of the spectrogram, as wide as that of the clips."""
    spectrogram: SpectrogramConfig = SpectrogramConfig()
    sound_mask: list[MaskOptions] = Field([{"name": "multiblock3d", "num_blocks": 4}] * 2, validate_default=True)
    """Masks of the spectrogram, whose rows are time and whose columns are frequency: for each entry of `mask` one that
    is applied together with it."""
    sound_coeff: float = Field(1.0, ge=0)
    """Weight of the loss of the sound; that of the video has 1."""


class AudioVisualJEPA(VJEPA):
    """Two encoders, each of which sees the visible tokens of its modality, and a predictor that sees all of them.

    The predictor attends to the features of both modalities, and predicts those of two EMA target encoders at the
    hidden positions of both. So the sound helps to predict what is not seen, and the pictures what is not heard.

    A batch has the views `clip` and `sound`, and the masks of the clip, then as many of the sound.

    Args:
        encoder: Any encoder that accepts masks.
        sound_encoder: Encoder of the sound, as wide.
        predictor: As for `VJEPA`, for tokens of which those of the sound are numbered after those of the clip.
        options: Loss and momentum.
        num_video: Number of tokens of a clip.
        kwargs: Further arguments of `VJEPA`.
    """

    options: Options

    def __init__(
        self,
        encoder: Encoder,
        sound_encoder: SoundEncoder,
        predictor: Predictor,
        options: Options,
        *,
        num_video: int,
        **kwargs: Any,
    ):
        super().__init__(encoder, predictor, options, **kwargs)
        self.sound_encoder = sound_encoder
        self.target_sound_encoder = copy.deepcopy(sound_encoder).requires_grad_(False)
        self.num_video = num_video
        self.train()

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute `loss`, its terms over both modalities as `VJEPA`, the loss and the spread of each modality."""
        clips = to_float(batch.clips, self.mean, self.std)
        spectrogram = self.sound_encoder.log_mel(batch.views["sound"])  # once for both encoders
        count = len(batch.masks_context) // 2
        seen, heard = list(batch.masks_context[:count]), list(batch.masks_context[count:])
        unseen, unheard = batch.masks_target[:count], batch.masks_target[count:]
        of_clip = hidden_features(self.target_encoder, clips, unseen)
        of_sound = hidden_features(self.target_sound_encoder.encoder, spectrogram, unheard)
        clip_context, sound_context = self.encoder(clips, seen), self.sound_encoder.encoder(spectrogram, heard)

        joint = batch.with_masks(self._numbered(seen, heard), self._numbered(unseen, unheard))
        contexts, targets = _joined(clip_context, sound_context), _joined(of_clip, of_sound)
        predictions = predict(self.predictor, contexts, targets, joint, rng)
        lengths = [(a.shape[1], b.shape[1]) for a, b in zip(of_clip, of_sound, strict=True)]
        predicted = [p.split(length, dim=1) for p, length in zip(predictions, lengths, strict=True)]
        video = self.losses([first for first, _ in predicted], of_clip, clip_context)
        heard_terms = self.losses([second for _, second in predicted], of_sound, sound_context)
        terms = {name: video[name] + self.options.sound_coeff * heard_terms[name] for name in video}
        return {
            **terms,
            "loss_video": video["loss"].detach(),
            "loss_sound": heard_terms["loss"].detach(),
            "spread_video": spread(of_clip),
            "spread_sound": spread(of_sound),
        }

    def _numbered(self, of_clip: Sequence[Tensor], of_sound: Sequence[Tensor]) -> list[Tensor]:
        """Return the positions of both modalities among the joint tokens."""
        return _joined(of_clip, [mask + self.num_video for mask in of_sound])

    def on_update(self, step: int) -> dict[str, float]:
        """Move the target encoders towards the encoders."""
        ema_update(self.target_sound_encoder, self.sound_encoder, self.momentum(step))
        return super().on_update(step)

    def parts(self) -> dict[str, nn.Module]:
        sound = {"sound_encoder": self.sound_encoder, "target_sound_encoder": self.target_sound_encoder}
        return {**super().parts(), **sound}

    def metadata(self) -> dict[str, Any]:
        return {"sound_encoder": self.sound_encoder.built_from}


def _joined(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[Tensor]:
    """Concatenate the tokens of two modalities, mask by mask."""
    return [torch.cat(pair, dim=1) for pair in zip(first, second, strict=True)]


@torch.no_grad()
def spread(features: Sequence[Tensor]) -> Tensor:
    """Return the standard deviation over clips of their mean features [B, K, D], averaged over channels and masks."""
    return torch.stack([x.float().mean(1).std(0, correction=0).mean() for x in features]).mean()


def further_masks(options: Options, setup: Setup) -> Sequence[MaskSampler]:
    """Return the samplers of the masks of the sound. Raises ValueError where they do not fit it."""
    count = setup.num_masks(at_least=1)
    if len(options.sound_mask) != count:
        raise ValueError(
            f"objective.sound_mask: {len(options.sound_mask)} mask(s), but `mask` has {count}; give as many"
        )
    try:
        shape = spectrogram_shape(options.spectrogram, _sound(setup))
        return build_collator(options.sound_mask, shape).samplers
    except ValueError as error:
        prefix = "objective.sound_" if str(error).startswith("mask") else "objective."
        raise ValueError(f"{prefix}{error}") from None


def build(options: Options, setup: Setup) -> AudioVisualJEPA:
    """Build encoders and predictor. Raises ValueError where they do not fit the clips, their sound or the masks."""
    num_masks = setup.num_masks(at_least=1)
    vjepa.check_masks(options, num_masks)
    sound, encoder = _sound(setup), setup.build_encoder(drop_tokens=True)
    try:
        sound_encoder = build_sound_encoder(options.sound_encoder, options.spectrogram, sound)
    except ValueError as error:
        raise ValueError(f"objective.{error}") from None
    name, width = options.sound_encoder.name, sound_encoder.embed_dim
    if not sound_encoder.accepts_masks:
        raise ValueError(f"objective.sound_encoder: {name} needs all tokens and cannot encode a part of the sound")
    if width != encoder.embed_dim:
        raise ValueError(
            f"objective.sound_encoder: its width {width} is not that of the encoder, {encoder.embed_dim}; set "
            f"embed_dim to {encoder.embed_dim}"
        )
    predictor = setup.build_predictor(options.predictor, encoder, num_masks)
    if not isinstance(predictor, VisionTransformerPredictor) or predictor.positions.use_rope:
        raise ValueError(
            "objective.predictor: positions of video and sound on one clock are those of vision_transformer_predictor "
            "with use_rope: false; take these"
        )
    video_grid, sound_grid = setup.clip.grid, sound_encoder.grid_size(sound.num_samples)
    try:
        positions = JointPositions(predictor.predictor_embed_dim, video_grid, sound_grid)
    except ValueError as error:
        raise ValueError(f"objective.predictor.embed_dim: {error}") from None
    predictor.positions = positions
    return AudioVisualJEPA(
        encoder,
        sound_encoder,
        predictor,
        options,
        num_video=video_grid.num_tokens,
        mean=setup.mean,
        std=setup.std,
        schedule_steps=setup.schedule_steps,
    )


def _sound(setup: Setup) -> SoundShape:
    if setup.sound is None:
        raise ValueError(
            "objective.name: audio_visual_jepa needs the sound of the videos; set data.format: {name: sounding_videos}"
        )
    return setup.sound
