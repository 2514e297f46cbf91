"""Accuracies of a probe, and the files in its folder."""

import csv
import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.config import ConfigError
from tubelet.runtime.distributed import World
from tubelet.runtime.files import replacing

TOP = 5


class NoneReadable(ConfigError):
    """None of the videos to validate can be read."""


@dataclasses.dataclass(frozen=True)
class Validated:
    """Predictions of G heads for n samples.

    Attributes:
        top1, top5: [G] accuracies in percent; top5 is None with fewer than 5 classes.
        loss: [G] mean losses.
        labels, indices: [n] of the samples.
        classes, probabilities: [G, n, TOP], the most probable classes, best first.
    """

    top1: list[float]
    top5: Sequence[float | None]
    loss: list[float]
    labels: Tensor
    indices: Tensor
    classes: Tensor
    probabilities: Tensor

    @property
    def finite(self) -> list[bool]:
        """Whether the losses of each head are finite; the other figures of a head whose losses are not mean nothing."""
        return [math.isfinite(loss) for loss in self.loss]


def validate(
    batches: Iterable[tuple[Tensor, Tensor, Tensor]], num_classes: int, world: World, source: str
) -> Validated:
    """Accuracy of heads over the samples of all processes, each of which belongs to one process.

    Args:
        batches: Probabilities [G, B, num_classes], labels [B] and indices [B] of this process's samples.
        num_classes: Number of classes.
        world: The processes; each gets the figures of all samples.
        source: Name of the data set, for messages.

    Raises:
        NoneReadable: No process has any sample.
    """
    top = min(TOP, num_classes)
    part = []
    for probabilities, labels, indices in batches:
        probabilities, labels = probabilities.cpu(), labels.cpu()
        losses = -probabilities[:, torch.arange(len(labels)), labels].clamp_min(1e-12).log()
        # Of equally probable classes the first: votes of neighbors are often equal.
        best, classes = (sorted_[..., :top] for sorted_ in probabilities.sort(dim=-1, descending=True, stable=True))
        part.append((indices, labels, losses.T, classes.transpose(0, 1), best.transpose(0, 1)))  # samples first
    parts = [batch for part in world.all_gather_object(part) for batch in part]
    if not parts:
        raise NoneReadable(f"{source}: none of the videos can be read")
    indices, labels, losses, classes, best = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = indices.argsort()
    indices, labels, losses = indices[order], labels[order], losses[order].T
    classes, best = classes[order].transpose(0, 1), best[order].transpose(0, 1)
    # A class without any vote of the neighbors is not among the first five, though it is in the sorted order.
    hits = ((classes == labels[:, None]) & (best > 0)).double()
    return Validated(
        top1=_percent(hits[..., 0]),
        top5=_percent(hits.sum(-1)) if num_classes >= TOP else [None] * len(hits),
        loss=losses.mean(1).tolist(),
        labels=labels,
        indices=indices,
        classes=classes,
        probabilities=best,
    )


def best_head(top1: Sequence[float], loss: Sequence[float], finite: Sequence[bool]) -> int | None:
    """Index of the head with the highest accuracy, and the lowest loss among equals; None where all have diverged.

    A head whose losses are not finite is not a candidate: what it predicts is arbitrary.
    """
    candidates = [g for g in range(len(top1)) if finite[g]]
    return max(candidates, key=lambda g: (top1[g], -loss[g]), default=None)


def _percent(hits: Tensor) -> list[float]:
    """Of hits [G, n], rounded so that it does not depend on the order of summation."""
    return [round(percent, 4) for percent in (100 * hits.mean(1)).tolist()]


def write_predictions(path: Path, validated: Validated, head: int, paths: Sequence[str]) -> None:
    """Write one line for each video: path, label, the predicted class and its probability, and the best classes.

    Paths that are not UTF-8 are written as the bytes that they are.
    """
    with (
        replacing(path) as temporary,
        open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
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


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Write `classes.csv`, the name of each label, where classes have names."""
    if classes:
        with replacing(folder / "classes.csv") as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("label", "class"), *enumerate(classes)])


def confusion(labels: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Number of samples [num_classes, num_classes] with each label (row) and each predicted class (column)."""
    pairs = labels * num_classes + predicted
    return pairs.bincount(minlength=num_classes**2).view(num_classes, num_classes)


def draw_confusion(path: Path, validated: Validated, head: int, num_classes: int) -> None:
    """Draw the confusion matrix: rows are true classes, columns predicted ones, each row in percent of its class."""
    from matplotlib.figure import Figure  # a slow import, so only a finished probe pays for it

    counts = confusion(validated.labels, validated.classes[head, :, 0], num_classes)
    percent = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    side = min(12.0, 3 + 0.3 * num_classes)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(percent.numpy(), vmin=0, vmax=100, cmap="Blues")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(image, label="% of the true class")
    if num_classes <= 20:
        axes.set_xticks(range(num_classes))
        axes.set_yticks(range(num_classes))
        for i, row in enumerate(percent.round().int().tolist()):
            for j, value in enumerate(row):
                if value:
                    color = "white" if value > 50 else "black"
                    axes.text(j, i, value, ha="center", va="center", fontsize=8, color=color)
    figure.savefig(path, dpi=100)


def over_seeds(seeds: Sequence[int], measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, with the results of each seed."""
    summary: dict[str, Any] = {}
    for key in ("top1", "top5", "shuffled_top1", "train_loss", "train_top1"):
        values = [result.get(key) for result in measured]
        if None in values:
            continue
        numbers = torch.tensor(values, dtype=torch.float64)
        summary |= {key: float(numbers.mean()), f"{key}_std": float(numbers.std()) if len(numbers) > 1 else 0.0}
    return summary | {"seeds": {str(seed): result for seed, result in zip(seeds, measured, strict=True)}}
