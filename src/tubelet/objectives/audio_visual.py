"""Classify videos by what is seen and heard, tell by how much their sound is shifted, or find the sound of a video."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from tubelet.data import Batch
from tubelet.models.correlation import LagCorrelation
from tubelet.models.fusion import Fusion
from tubelet.models.interfaces import Encoder
from tubelet.models.sound import SoundEncoder
from tubelet.objectives.encoder_objective import EncoderObjective
from tubelet.objectives.losses.contrastive import ContrastiveLoss
from tubelet.training.objective import StepRng
from tubelet.training.optimizer import layer_decay


class SoundingObjective(EncoderObjective):
    """Base class of objectives that read the tokens of an encoder of clips and of one of sound.

    A batch has the views `clip`, uint8 [B, C, T, H, W], and `sound`, float32 [B, channels, samples], as far as there
    are encoders.

    Args:
        encoder: Maps clips to tokens [B, N, D]; None to leave the pictures out.
        sound_encoder: Maps sound to tokens; None to leave the sound out.
        frozen_sound: Do not train the encoder of the sound.
        kwargs: Further arguments of `EncoderObjective`.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        sound_encoder: SoundEncoder | None,
        *,
        frozen_sound: bool = False,
        **kwargs: Any,
    ):
        super().__init__(encoder, **kwargs)
        self.sound_encoder, self.frozen_sound = sound_encoder, frozen_sound
        if frozen_sound and sound_encoder is not None:
            sound_encoder.requires_grad_(False)

    def encode_sound(self, batch: Batch) -> Tensor:
        """Return the tokens [B, N, D] of the sound, without gradients where its encoder is frozen."""
        assert self.sound_encoder is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_sound):
            return self.sound_encoder(batch.views["sound"])

    def tokens(self, batch: Batch) -> dict[str, Tensor]:
        """Return the tokens of each modality."""
        tokens = {}
        if self.encoder is not None:
            tokens["video"] = self.encode(batch)
        if self.sound_encoder is not None:
            tokens["sound"] = self.encode_sound(batch)
        return tokens

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen_sound and self.sound_encoder is not None:
            self.sound_encoder.eval()
        return self

    def lr_scales(self) -> Mapping[nn.Parameter, float]:
        of_clips = super().lr_scales()
        if self.sound_encoder is None or self.frozen_sound or self.encoder_layer_decay == 1:
            return of_clips
        return {**of_clips, **layer_decay(self.sound_encoder.encoder, self.encoder_layer_decay)}

    def metadata(self) -> dict[str, Any]:
        if self.sound_encoder is None or self.frozen_sound:
            return {}
        return {"sound_encoder": self.sound_encoder.built_from}


class AudioVisual(SoundingObjective):
    """Cross-entropy of a class, the target `label`, that a fusion of the modalities tells.

    Args:
        encoder, sound_encoder: See `SoundingObjective`.
        fusion: Maps the tokens of `video` and `sound` to logits.
        kwargs: Further arguments of `SoundingObjective`.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        sound_encoder: SoundEncoder | None,
        fusion: Fusion | LagCorrelation,
        **kwargs: Any,
    ):
        super().__init__(encoder, sound_encoder, **kwargs)
        self.fusion = fusion

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute the cross-entropy `loss` and `train_top1` in percent."""
        logits = self.logits(batch)
        hits = logits.detach().argmax(-1) == batch.labels
        return {"loss": F.cross_entropy(logits.float(), batch.labels), "train_top1": 100 * hits.float().mean()}

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits [B, classes] of each sample."""
        return self.fusion(self.tokens(batch))


class Synchronisation(AudioVisual):
    """Cross-entropy of the number of a shift: the sound is that of `shifts[number]` seconds later than the pictures.

    The view `sound` of a batch begins `margin` seconds before the clip and ends as much after it, where `margin` is the
    largest shift. Training draws a shift for each sample.

    Args:
        shifts: Seconds, ascending.
        sample_rate: Samples of the sound per second.
        args, kwargs: Further arguments of `AudioVisual`.
    """

    def __init__(self, *args, shifts: Sequence[float], sample_rate: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.margin = round(largest(shifts) * sample_rate)
        self.offsets = [self.margin + round(shift * sample_rate) for shift in shifts]

    def prepare_batch(self, batch: Batch, rng: StepRng) -> Batch:
        """Shift the sound of each sample."""
        view = next(iter(batch.views))
        numbers = [seed % len(self.offsets) for seed in rng.clip_seeds(batch, "shift", view)]
        return self.shifted(batch, numbers)

    def shifted(self, batch: Batch, numbers: Sequence[int]) -> Batch:
        """Return a batch in which the sound of sample i has the shift `numbers[i]`, which is its label."""
        views = dict(batch.views)
        if "sound" in views:
            sound = views["sound"]
            length = sound.shape[-1] - 2 * self.margin
            starts = [self.offsets[number] for number in numbers]
            views["sound"] = torch.stack([s[:, i : i + length] for s, i in zip(sound, starts, strict=True)])
        labels = torch.tensor(numbers).to(batch.indices.device, non_blocking=True)
        return dataclasses.replace(batch, views=views, targets={**batch.targets, "label": labels})


class VideoSoundAlignment(SoundingObjective):
    """Contrastive loss of the embeddings of videos and of their sounds, with those of all processes as negatives.

    Args:
        encoder, sound_encoder: See `SoundingObjective`.
        video_head: Maps the tokens {"video": [B, N, D]} to embeddings [B, E].
        sound_head: Maps the tokens {"sound": [B, N, D]} to embeddings [B, E].
        temperature: Initial temperature of the loss.
        kwargs: Further arguments of `SoundingObjective`.
    """

    def __init__(
        self,
        encoder: Encoder,
        sound_encoder: SoundEncoder,
        video_head: Fusion,
        sound_head: Fusion,
        *,
        temperature: float,
        **kwargs: Any,
    ):
        super().__init__(encoder, sound_encoder, **kwargs)
        self.video_head, self.sound_head = video_head, sound_head
        self.contrastive = ContrastiveLoss(temperature)

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute the `loss` of both directions, and its `temperature`."""
        return {"loss": self.contrastive(*self.embed(batch)), "temperature": self.contrastive.temperature}

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the embeddings [B, E] of the videos and of the sounds."""
        tokens = self.tokens(batch)
        return self.video_head({"video": tokens["video"]}), self.sound_head({"sound": tokens["sound"]})


def largest(shifts: Sequence[float]) -> float:
    """Return the largest shift in either direction, in seconds."""
    return max(map(abs, shifts))
