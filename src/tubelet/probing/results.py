"""What a probe measured: accuracies, and the files in its folder."""

import csv
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.training.run_folder import write_whole

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


def validate(batches: Iterable[tuple[Tensor, Tensor, Tensor]], num_classes: int) -> Validated:
    """batches: probabilities [G, B, num_classes], labels [B], indices [B], each sample once."""
    from torchmetrics.classification import MulticlassAccuracy  # takes seconds, which only a working probe should need

    top = min(TOP, num_classes)
    accuracies: list[list[MulticlassAccuracy]] = []
    losses, every = [], []
    for probabilities, labels, indices in batches:
        probabilities, labels = probabilities.cpu(), labels.cpu()
        if not accuracies:
            accuracies = [
                [MulticlassAccuracy(num_classes, top_k=k, average="micro") for k in (1, top)] for _ in probabilities
            ]
        for metrics, head in zip(accuracies, probabilities, strict=True):
            for metric in metrics:
                metric.update(head, labels)
        losses.append(-probabilities[:, torch.arange(len(labels)), labels].clamp_min(1e-12).log())
        every.append((labels, indices, *probabilities.topk(top, dim=-1)))
    labels, indices, best, classes = zip(*every, strict=True)
    percent = [[round(100 * float(metric.compute()), 4) for metric in metrics] for metrics in accuracies]
    return Validated(
        top1=[p[0] for p in percent],
        top5=[p[1] if num_classes >= TOP else None for p in percent],
        loss=torch.cat(losses, dim=1).mean(1).tolist(),
        labels=torch.cat(labels),
        indices=torch.cat(indices),
        classes=torch.cat(classes, dim=1),
        probabilities=torch.cat(best, dim=1),
    )


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
    from matplotlib.figure import Figure  # like torchmetrics, only for a probe that has come to its end
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
    write_whole(path, json.dumps(content, indent=1) + "\n")
