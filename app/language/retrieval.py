"""Evaluate retrieval: embeddings of videos and texts, ranks, and classification by class names."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from app.language.data import Record
from app.language.options import ZeroShotConfig
from app.language.videos import Run, map_records
from tubelet.config import ConfigError
from tubelet.data.sources import read_list
from tubelet.objectives.losses.retrieval import retrieval_metrics
from tubelet.objectives.video_text_alignment import VideoTextAlignment
from tubelet.runtime.precision import autocast


def embed_videos(
    model: VideoTextAlignment, records: Sequence[Record], run: Run
) -> tuple[dict[int, Tensor], dict[str, str]]:
    """Return the embedding of each video, by index, and the reason for each one that could not be read."""
    return map_records(lambda batch: list(model.embed_videos(batch).float().cpu()), model, records, run)


@torch.no_grad()
def embed_texts(model: VideoTextAlignment, texts: Sequence[str], run: Run) -> Tensor:
    """Return the embeddings [M, E] of texts."""
    device = run.world.device
    dtype = run.options.dtype_on(device)
    model.eval()
    parts = []
    for target in run.text.targets(texts).split(run.options.evaluation.batch_size):
        with autocast(device, dtype):
            parts.append(model.embed_texts(target.to(device)).float().cpu())
    model.train()
    return torch.cat(parts)


def measure(embedded: dict[int, Tensor], texts: Tensor, records: Sequence[Record]) -> dict[str, float]:
    """Return the metrics of retrieval among the videos that could be read.

    Args:
        embedded: Embedding of each video, by index of its record.
        texts: Embeddings of all references, record by record.
        records: The records.
    """
    of_text = torch.tensor([i for i, record in enumerate(records) for _ in record.references])
    indices = sorted(embedded)
    row = torch.full((len(records),), -1)
    row[indices] = torch.arange(len(indices))
    kept = row[of_text] >= 0
    videos = torch.stack([embedded[i] for i in indices])
    return retrieval_metrics(videos, texts[kept], row[of_text[kept]])


def nearest_texts(videos: Sequence[Tensor], vectors: Tensor, texts: Sequence[str]) -> list[str]:
    """Return, for each embedding of a video, that of `texts` whose embedding is the most similar one."""
    if not videos:
        return []
    similarity = nn.functional.normalize(torch.stack(list(videos)), dim=1) @ nn.functional.normalize(vectors, dim=1).T
    return [texts[number] for number in similarity.argmax(1).tolist()]


def class_texts(zero_shot: ZeroShotConfig) -> list[str]:
    """Return the text of each class."""
    return [zero_shot.template.replace("{}", name) for name in zero_shot.class_names]


def zero_shot_records(zero_shot: ZeroShotConfig) -> list[Record]:
    """Return the labelled videos, each with the text of its class.

    Raises:
        ConfigError: The list cannot be read, or a label has no name.
    """
    source = read_list(Path(zero_shot.dataset))
    texts, records = class_texts(zero_shot), []
    for path, label in zip(source.paths, source.labels, strict=True):
        if not 0 <= label < len(texts):
            raise ConfigError(
                f"evaluation.zero_shot: {path} has label {label}; the {len(texts)} class_names are labels 0 to "
                f"{len(texts) - 1}"
            )
        records.append(Record(path, "", (texts[label],), str(label)))
    return records


def zero_shot_accuracy(embedded: dict[int, Tensor], names: Tensor, records: Sequence[Record]) -> float:
    """Return the percentage of videos that are most similar to the name of their class, given its embedding [C, E]."""
    indices = sorted(embedded)
    videos = nn.functional.normalize(torch.stack([embedded[i] for i in indices]), dim=1)
    predicted = (videos @ nn.functional.normalize(names, dim=1).T).argmax(1)
    labels = torch.tensor([int(records[i].type) for i in indices])
    return 100 * float((predicted == labels).float().mean())
