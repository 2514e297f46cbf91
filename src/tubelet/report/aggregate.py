"""Tables of a study from the results of single probes, and the comparison of pretrained with random encoders."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tubelet.runtime.text import text_table

Cell = list  # [mean, standard deviation or None], in percent
Table = dict[str, dict[str, Cell]]

# The pretrained encoder is called better where it is at least this much above the best random one.
MIN_POINTS = 10.0
MIN_DEVIATIONS = 3.0


@dataclass(frozen=True)
class Result:
    """Accuracy of one head on one encoder, or of a baseline, on one task.

    Args:
        row: `random`, `pretrained`, `supervised`, `baseline_frame`, …
        head: `probe` (attentive) or `linear`.
        task: Name of the task.
        seed: Seed of the encoder.
        head_seed: Seed of the head.
        top1: Top-1 accuracy in percent.
        count: Number of test videos.
        fold: Fold of the cross-validation.
        init_std: Standard deviation of the initial weights of a random encoder.
    """

    row: str
    head: str
    task: str
    seed: int
    head_seed: int
    top1: float
    count: int
    fold: int = 0
    init_std: float | None = None


def tables(results: Sequence[Result], default_init_std: float | None) -> dict[str, Any]:
    """Average the results.

    Folds are pooled first: correct predictions over all their test videos. Means and sample standard deviations are
    over the seeds of encoder and head; the standard deviation of a single result is None.

    Args:
        results: Results of single probes.
        default_init_std: Standard deviation of the initial weights with which a random encoder counts as `random`.
            `random_best` has for each task the scale with the highest mean, which is selected on the test videos and
            so favors the random encoder.

    Returns:
        `probe` and `linear`: row -> task -> [mean, std]. `random_scales`: head -> scale -> task -> [mean, std].
    """
    report: dict[str, Any] = {"probe": {}, "linear": {}, "random_scales": {"probe": {}, "linear": {}}}
    for head, row, task in dict.fromkeys((r.head, r.row, r.task) for r in results):
        group = [r for r in results if (r.head, r.row, r.task) == (head, row, task)]
        if row != "random":
            report[head].setdefault(row, {})[task] = mean_and_std(pooled_over_folds(group))
            continue
        scales = {std: [r for r in group if r.init_std == std] for std in dict.fromkeys(r.init_std for r in group)}
        cells = {std: mean_and_std(pooled_over_folds(part)) for std, part in scales.items()}
        for std, cell in cells.items():
            report["random_scales"][head].setdefault(str(std), {})[task] = cell
        report[head].setdefault("random_best", {})[task] = max(cells.values(), key=lambda cell: cell[0])
        if default_init_std in cells:
            report[head].setdefault("random", {})[task] = cells[default_init_std]
    return report


def pooled_over_folds(results: Iterable[Result]) -> list[float]:
    """Return the accuracy in percent for each pair of seeds: correct predictions of all folds over all test videos."""
    by_seeds: dict[tuple, list[Result]] = {}
    for result in results:
        by_seeds.setdefault((result.seed, result.head_seed), []).append(result)
    return [sum(r.top1 * r.count for r in part) / sum(r.count for r in part) for part in by_seeds.values()]


def mean_and_std(values: Sequence[float]) -> Cell:
    """Return [mean, sample standard deviation], the latter None for a single value."""
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]


def standard_error(percent: float, count: int) -> float:
    """Return the binomial standard error of an accuracy in percent on `count` videos."""
    return math.sqrt(percent * (100 - percent) / count)


def standard_errors(results: Sequence[Result]) -> dict[str, dict[str, dict[str, float]]]:
    """Return head -> row -> task -> `standard_error` of the mean accuracy, in points; without random encoders."""
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for head, row, task in dict.fromkeys((r.head, r.row, r.task) for r in results if r.init_std is None):
        group = [r for r in results if (r.head, r.row, r.task) == (head, row, task)]
        videos = {r.fold: r.count for r in group}
        percent = statistics.fmean(pooled_over_folds(group))
        errors.setdefault(head, {}).setdefault(row, {})[task] = standard_error(percent, sum(videos.values()))
    return errors


def margin(table: Table, task: str, row: str = "pretrained", reference: str = "random_best") -> dict[str, Any] | None:
    """Return by how much the accuracy of a row is above that of a reference row.

    Returns:
        `points`: difference of the means. `std`: standard deviation of the difference of two single runs, not of their
        means: sqrt(std_row² + std_reference²). `deviations`: `points` / `std`. `std` is None where a standard deviation
        is unknown, `deviations` also where both are zero. None where a row is missing.
    """
    if task not in table.get(row, {}) or task not in table.get(reference, {}):
        return None
    (mean, row_std), (reference_mean, reference_std) = table[row][task], table[reference][task]
    points = mean - reference_mean
    std = None if row_std is None or reference_std is None else math.hypot(row_std, reference_std)
    return {"points": points, "std": std, "deviations": points / std if std else None}


def verdict(report: dict[str, Any], task: str) -> str:
    """Describe whether the pretrained encoder is better than the best random one on `task`."""
    table = report["probe"]
    difference = margin(table, task)
    if difference is None:
        return f"{task}: there are no results of both a pretrained and a random encoder."
    (pretrained, _), (random, _) = table["pretrained"][task], table["random_best"][task]
    points, deviations = difference["points"], difference["deviations"]
    better = points >= MIN_POINTS and deviations is not None and deviations >= MIN_DEVIATIONS
    if deviations is None:
        significance = "unknown standard deviation"
    else:
        significance = (
            f"{deviations:.1f} standard deviations (sqrt(std² pretrained + std² random) of single runs = "
            f"{difference['std']:.1f} points)"
        )
    return (
        f"{task}, attentive probe: pretrained {pretrained:.1f} %, best random encoder {random:.1f} %: "
        f"{points:+.1f} points, {significance}. The pretrained encoder {'beats' if better else 'does not beat'} the "
        f"best random one by at least {MIN_POINTS:.0f} points and {MIN_DEVIATIONS:.0f} standard deviations."
        f"{_further_comparisons(table, task)}"
    )


def _further_comparisons(table: Table, task: str) -> str:
    """Compare the pretrained encoder with the random one with few labels, and with frame differences."""
    sentences = []
    for name, reference, column in (
        ("the best random encoder with few labels", "random_best", f"{task}_few"),
        ("the frame-difference baseline", "baseline_difference", task),
    ):
        if (difference := margin(table, column, reference=reference)) is not None:
            points = difference["points"]
            relation = "above" if points > 0 else "below" if points < 0 else "equal to"
            sentences.append(f" It is {relation} {name} ({points:+.1f} points).")
    return "".join(sentences)


ROWS = {
    "random": "frozen random encoder, default initialization",
    "random_best": "frozen random encoder, best initialization scale",
    "pretrained": "frozen pretrained encoder",
    "supervised": "same encoder, trained from scratch with labels",
    "baseline_frame": "non-learned baseline: middle frame",
    "baseline_difference": "non-learned baseline: absolute frame differences",
    "baseline_metadata": "non-learned baseline: size and length of the video",
}
"""Title of each row of a table, in order."""


def rows_of(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return (head, row, title) of each line of the table."""
    lines = []
    for row, title in ROWS.items():
        for head in ("probe", "linear"):
            if row in report.get(head, {}):
                lines.append((head, row, f"{title}, {HEADS[head]}" if row in FROZEN else title))
    return lines


HEADS = {"probe": "attentive probe", "linear": "linear probe"}
FROZEN = ("random", "random_best", "pretrained")

DESCRIPTIONS = {
    "attentive probe": "a learned query attends to all tokens of the frozen encoder, then a linear layer",
    "linear probe": "a linear layer on the mean of the frozen encoder's tokens",
    "frozen random encoder": "not trained: what architecture and probe reach without pretraining",
    "frozen pretrained encoder": "pretrained without labels, then frozen; only the probe is trained with labels",
    "trained from scratch": "encoder and attentive head trained together, with these labels only",
    "middle frame": "logistic regression on the colors of one frame in 16 × 16 cells: what needs no motion",
    "absolute frame differences": "logistic regression on the absolute differences of frames in 8 × 8 cells: "
    "where something moves, but not in which direction",
    "size and length": "logistic regression on width, height and length of the video: what needs no content",
}
"""Explanation of each term in the titles of rows."""


def results_table(report: dict[str, Any]) -> str:
    """Return the table in plain text: a line for each row and head, a column for each task."""
    tasks = tasks_of(report)
    rows = [
        [title, *(text_cell(report[head][row].get(task)) for task in tasks)] for head, row, title in rows_of(report)
    ]
    return text_table(rows, ["top-1 in %", *(task.replace("_", " ") for task in tasks)], align_right=True)


def tasks_of(report: dict[str, Any]) -> list[str]:
    """Return the columns of the table."""
    return list(dict.fromkeys(task for head in HEADS for row in report.get(head, {}).values() for task in row))


def text_cell(cell: Cell | None) -> str:
    """Format [mean, std] as `70.0 ± 1.0`."""
    if cell is None:
        return "-"
    mean, std = cell
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
