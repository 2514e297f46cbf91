"""Align videos and texts: embeddings of a video and of its text are closer than those of other pairs (CLIP)."""

from typing import Any

import torch
from torch import Tensor, nn

from tubelet.data import Batch
from tubelet.language.prefix_lm import PrefixLanguageModel
from tubelet.models.interfaces import Encoder
from tubelet.objectives.losses.contrastive import ContrastiveLoss
from tubelet.objectives.video_to_text import Bridge, LinearHead, VideoEncoding
from tubelet.training.objective import StepRng


class VideoTextAlignment(VideoEncoding):
    """Contrastive loss of the embeddings of videos and of their texts.

    A batch is one of `tubelet.objectives.video_to_text.VideoToText`; prompts are not read.

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
        loss = self.contrastive(self.embed_videos(batch), self.embed_texts(batch.tensor("target")))
        return {"loss": loss, "temperature": (-self.contrastive.log_scale[0]).exp().detach()}

    def embed_videos(self, batch: Batch) -> Tensor:
        """Return the embedding [B, E] of each video."""
        return self.prefix(batch)[:, 0]

    def embed_texts(self, target: Tensor) -> Tensor:
        """Return the embedding [B, E] of texts, given as token numbers int64 [B, L], then IGNORED."""
        return self.text_head(self.language_model.features_at_end(target))


@torch.no_grad()
def retrieval_metrics(videos: Tensor, texts: Tensor, video_of_text: Tensor) -> dict[str, float]:
    """Rank all videos for each text and all texts for each video by the cosine of their embeddings.

    Args:
        videos: [V, E].
        texts: [M, E].
        video_of_text: int64 [M], the video that each text is about; each video has at least one.

    Returns:
        For `text_to_video` and `video_to_text`: `r1`, `r5` and `r10` in percent, and the median rank, from 1. A video's
        rank is that of its best text. Equal similarities rank in the middle of their group, so that constant embeddings
        have chance level.
    """
    similarity = nn.functional.normalize(texts.double(), dim=1) @ nn.functional.normalize(videos.double(), dim=1).T
    own = similarity.gather(1, video_of_text[:, None])
    text_ranks = _rank(similarity, own)
    best = torch.full((len(videos),), -2.0, dtype=similarity.dtype).scatter_reduce(0, video_of_text, own[:, 0], "amax")
    # Other texts of the same video are no competitors.
    others = similarity.T.masked_fill(video_of_text[None] == torch.arange(len(videos))[:, None], -2.0)
    video_ranks = _rank(torch.cat([others, best[:, None]], 1), best[:, None])
    return {
        f"{direction}_{name}": value
        for direction, ranks in (("text_to_video", text_ranks), ("video_to_text", video_ranks))
        for name, value in _summary(ranks).items()
    }


def _rank(similarity: Tensor, own: Tensor) -> Tensor:
    """Return the rank of `own` [M, 1] in each row of `similarity` [M, K], which contains it, from 1."""
    above = (similarity > own).sum(1)
    equal = (similarity == own).sum(1)
    return 1 + above + (equal - 1) / 2


def _summary(ranks: Tensor) -> dict[str, float]:
    within = {f"r{k}": 100 * float((ranks <= k).double().mean()) for k in (1, 5, 10)}
    return {**within, "median_rank": float(ranks.double().median())}
