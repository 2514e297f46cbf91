"""Classify videos by what is seen and heard, or tell by how many seconds the sound is shifted against the pictures."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tubelet.data import Batch
from tubelet.models.correlation import LagCorrelation
from tubelet.models.fusion import Fusion
from tubelet.models.interfaces import Encoder
from tubelet.models.sound import SoundEncoder
from tubelet.objectives.encoder_objective import EncoderObjective
from tubelet.training.objective import StepRng


class AudioVisual(EncoderObjective):
    """Cross-entropy of a class that a fusion of the modalities tells.

    A batch has the views `clip`, uint8 [B, C, T, H, W], and `sound`, float32 [B, channels, samples], as far as there
    are encoders, and the target `label`.

    Args:
        encoder: Maps clips to tokens [B, N, D]; None to leave the pictures out.
        sound_encoder: Maps sound to tokens; None to leave the sound out.
        fusion: Maps the tokens of `video` and `sound` to logits.
        kwargs: Further arguments of `EncoderObjective`.
    """

    def __init__(
        self,
        encoder: Encoder | None,
        sound_encoder: SoundEncoder | None,
        fusion: Fusion | LagCorrelation,
        **kwargs: Any,
    ):
        super().__init__(encoder, **kwargs)
        self.sound_encoder, self.fusion = sound_encoder, fusion

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute the cross-entropy `loss` and `train_top1` in percent."""
        logits = self.logits(batch)
        hits = logits.detach().argmax(-1) == batch.labels
        return {"loss": F.cross_entropy(logits.float(), batch.labels), "train_top1": 100 * hits.float().mean()}

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits [B, classes] of each sample."""
        return self.fusion(self.tokens(batch))

    def tokens(self, batch: Batch) -> dict[str, Tensor]:
        """Return the tokens of each modality."""
        tokens = {}
        if self.encoder is not None:
            tokens["video"] = self.encode(batch)
        if self.sound_encoder is not None:
            tokens["sound"] = self.sound_encoder(batch.views["sound"])
        return tokens


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


def largest(shifts: Sequence[float]) -> float:
    """Return the largest shift in either direction, in seconds."""
    return max(map(abs, shifts))
