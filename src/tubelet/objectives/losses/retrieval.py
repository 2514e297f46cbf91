"""How well embeddings of videos and of their partners, texts or sounds, find each other."""

import torch
from torch import Tensor, nn


@torch.no_grad()
def retrieval_metrics(videos: Tensor, texts: Tensor, video_of_text: Tensor, *, name: str = "text") -> dict[str, float]:
    """Rank all videos for each text and all texts for each video by the cosine of their embeddings.

    Args:
        videos: [V, E].
        texts: [M, E].
        video_of_text: int64 [M], the video that each text is about; each video has at least one.
        name: What the texts are, which may be sounds as well, in the names of the results.

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
        f"{direction}_{metric}": value
        for direction, ranks in ((f"{name}_to_video", text_ranks), (f"video_to_{name}", video_ranks))
        for metric, value in _summary(ranks).items()
    }


def _rank(similarity: Tensor, own: Tensor) -> Tensor:
    """Return the rank of `own` [M, 1] in each row of `similarity` [M, K], which contains it, from 1."""
    above = (similarity > own).sum(1)
    equal = (similarity == own).sum(1)
    return 1 + above + (equal - 1) / 2


def _summary(ranks: Tensor) -> dict[str, float]:
    within = {f"r{k}": 100 * float((ranks <= k).double().mean()) for k in (1, 5, 10)}
    return {**within, "median_rank": float(ranks.double().median())}
