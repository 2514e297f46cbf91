"""Align videos and texts: embeddings of a video and of its text are closer than those of other pairs (CLIP)."""

from typing import Any

from torch import Tensor

from tubelet.data import Batch
from tubelet.language.prefix_lm import PrefixLanguageModel
from tubelet.models.interfaces import Encoder
from tubelet.objectives.losses.contrastive import ContrastiveLoss
from tubelet.objectives.video_to_text import Bridge, LinearHead, VideoEncoding
from tubelet.training.objective import StepRng


class VideoTextAlignment(VideoEncoding):
    """Contrastive loss of the embeddings of videos and of their texts.

    Other texts of the same video and other videos with the same text are no negatives. A batch is one of
    `tubelet.objectives.video_to_text.VideoToText`; prompts are not read.

    Args:
        encoder: Maps clips [B, C, T, H, W] to tokens [B, N, D].
        bridge: Maps tokens to one vector [B, 1, E].
        language_model: Reads the texts.
        text_head: Maps the language model's features to [B, E].
        temperature: Initial temperature of the loss.
        kwargs: Further arguments of `VideoEncoding`.
    """

    def __init__(
        self,
        encoder: Encoder,
        bridge: Bridge,
        language_model: PrefixLanguageModel,
        text_head: LinearHead,
        *,
        temperature: float,
        **kwargs: Any,
    ):
        super().__init__(encoder, bridge, **kwargs)
        self.language_model, self.text_head = language_model, text_head
        language_model.freeze_output()
        self.contrastive = ContrastiveLoss(temperature)

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        numbers = self.of_texts(batch, "video_number"), self.of_texts(batch, "text_number")
        loss = self.contrastive(self.embed_videos(batch), self.embed_texts(self.of_texts(batch, "target")), numbers)
        return {"loss": loss, "temperature": self.contrastive.temperature}

    def embed_videos(self, batch: Batch) -> Tensor:
        """Return the embedding [B, E] of each video."""
        return self.prefix(batch)[:, 0]

    def embed_texts(self, target: Tensor) -> Tensor:
        """Return the embedding [B, E] of texts, given as token numbers int64 [B, L], then IGNORED."""
        return self.text_head(self.language_model.features_at_end(target))
