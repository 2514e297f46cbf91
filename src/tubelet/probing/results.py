"""What a probe measured: accuracies, and the files in its folder."""

import csv
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.config import ConfigError
from tubelet.runtime.distributed import World
from tubelet.runtime.run_folder import write_atomic

TOP = 5


@dataclasses.dataclass(frozen=True)
class Validated:
    """G heads on n samples: top1 and top5 [G] in percent (None with fewer than 5 classes), mean loss [G];
    labels and indices [n]; the likeliest classes and their probabilities [G, n, TOP], best first."""

    top1: list[float]
    top5: list[float | None]
    loss: list[float]
    labels: Tensor
    indices: Tensor
    classes: Tensor
    probabilities: Tensor


def validate(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], num_classes: int, world: World, source: str
) -> Validated:
    """batches: probabilities [G, B, num_classes], labels [B], indices [B] of this process's samples.

    Every process gets the figures of all samples, each of which is one process's: nothing is padded, nothing twice.
    Raises ConfigError that names their `source` where no process has any.
    """
    top = min(TOP, num_classes)
    own = []
    for probabilities, labels, indices in batches:
        probabilities, labels = probabilities.cpu(), labels.cpu()
        losses = -probabilities[:, torch.arange(len(labels)), labels].clamp_min(1e-12).log()
        best, classes = probabilities.topk(top, dim=-1)
        own.append((indices, labels, losses.T, classes.transpose(0, 1), best.transpose(0, 1)))  # samples first
    everyone = [part for parts in world.all_gather_object(own) for part in parts]
    if not everyone:
        raise ConfigError(f"{source}: not one of the videos can be read")
    indices, labels, losses, classes, best = (torch.cat(part) for part in zip(*everyone, strict=True))
    order = indices.argsort()
    indices, labels, losses = indices[order], labels[order], losses[order].T
    classes, best = classes[order].transpose(0, 1), best[order].transpose(0, 1)
    hits = (classes == labels[:, None]).double()
    return Validated(
        top1=_percent(hits[..., 0]),
        top5=_percent(hits.sum(-1)) if num_classes >= TOP else [None] * len(hits),
        loss=losses.mean(1).tolist(),
        labels=labels,
        indices=indices,
        classes=classes,
        probabilities=best,
    )


def _percent(hits: Tensor) -> list[float]:
    """Of hits [G, n], rounded to what does not depend on the order of the sum."""
    return [round(percent, 4) for percent in (100 * hits.mean(1)).tolist()]


def write_predictions(path: Path, validated: Validated, head: int, paths: Sequence[str]) -> None:
    """One line a video: path, label, the predicted class and its probability, and the best five classes."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "predicted", "probability", "top5"])
        rows = zip(
            validated.indices.tolist(),
            validated.labels.tolist(),
            validated.classes[head].tolist(),
            validated.probabilities[head].tolist(),
            strict=True,
        )
        for index, label, classes, probabilities in rows:
            writer.writerow([paths[index], label, classes[0], f"{probabilities[0]:.4f}", " ".join(map(str, classes))])


def draw_confusion(path: Path, validated: Validated, head: int, num_classes: int) -> None:
    """A picture: rows are true classes, columns predicted ones, each row in percent of its class."""
    from matplotlib.figure import Figure  # these take seconds, which only a probe that has come to its end should need
    from torchmetrics.classification import MulticlassConfusionMatrix

    counts = MulticlassConfusionMatrix(num_classes)(validated.classes[head, :, 0], validated.labels)
    share = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    side = min(12.0, 3 + 0.3 * num_classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share.numpy(), vmin=0, vmax=100, cmap="Blues")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, label="% of the true class")
    if num_classes <= 20:
        axes.set_xticks(range(num_classes))
        axes.set_yticks(range(num_classes))
        for i, row in enumerate(share.round().int().tolist()):
            for j, percent in enumerate(row):
                if percent:
                    axes.text(
                        j, i, percent, ha="center", va="center", fontsize=8, color="white" if percent > 50 else "black"
                    )
    figure.savefig(path, dpi=100)


def over_seeds(seeds: Sequence[int], each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample) over seeds, with each seed's results."""
    summary: dict[str, Any] = {}
    for key in ("top1", "top5", "train_loss", "train_top1"):
        values = [result[key] for result in each]
        if None in values:
            continue
        values = torch.tensor(values, dtype=torch.float64)
        summary |= {key: float(values.mean()), f"{key}_std": float(values.std()) if len(values) > 1 else 0.0}
    return summary | {"seeds": {str(seed): result for seed, result in zip(seeds, each, strict=True)}}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote; None where nothing is."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
