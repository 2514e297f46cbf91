"""Answer questions about a video by choosing among the frequent answers."""

from typing import Any

import torch
from torch import Tensor, nn

from tubelet.data import Batch
from tubelet.language.prefix_lm import PrefixLanguageModel
from tubelet.models.interfaces import Encoder
from tubelet.objectives.video_to_text import Bridge, LinearHead, VideoEncoding
from tubelet.training.objective import StepRng


class VideoToAnswer(VideoEncoding):
    """Cross-entropy of the right one of given answers, after the video and the question.

    A batch is one of `tubelet.language.dataset.TextVideos`; `target` is not read.

    Args:
        encoder: Maps clips [B, C, T, H, W] to tokens [B, N, D].
        bridge: Maps tokens to the prefix of the language model.
        language_model: Reads the prefix and the question.
        head: Maps its features to logits of the answers.
        kwargs: Further arguments of `VideoEncoding`.
    """

    def __init__(
        self,
        encoder: Encoder,
        bridge: Bridge,
        language_model: PrefixLanguageModel,
        head: LinearHead,
        **kwargs: Any,
    ):
        super().__init__(encoder, bridge, **kwargs)
        self.language_model, self.head = language_model, head
        language_model.freeze_output()

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.logits(batch).float(), self.of_texts(batch, "answer"))}

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits [B * n, A] of the answers to the n questions about each video."""
        question = self.of_texts(batch, "prompt"), self.of_texts(batch, "prompt_used")
        return self.head(self.language_model.features_after(self.prefix(batch), *question))

    @torch.no_grad()
    def choose(self, batch: Batch) -> list[int]:
        """Return the number of the most probable answer to each question."""
        return self.logits(batch).argmax(1).tolist()
