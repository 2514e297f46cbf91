"""Tables of a study from the results of single probes, and the comparison of pretrained with random encoders."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Cell = list  # [mean, standard deviation or None], in percent
Rows = dict[str, dict[str, Cell]]
"""Row -> task -> cell."""

FINE_TUNED = "fine_tuned"
"""In place of a head: all weights are trained with the labels, starting from a pretraining or from scratch."""
BASELINE = "baseline"
"""In place of a head: no network; the rows are the kinds of baselines."""
SHUFFLED = "_shuffled"
"""Appended to the name of a head: accuracy with the frames in random order."""
REFERENCE = {FINE_TUNED: "supervised"}
"""Head -> row that pretraining is compared with; for all others the best random encoder."""

# The pretrained encoder is called better where it is at least this much above the best random one.
MIN_POINTS = 10.0
MIN_DEVIATIONS = 3.0


@dataclass(frozen=True)
class Result:
    """Accuracy of one head on one encoder, or of a baseline, on one task.

    Args:
        row: Name of the objective, `random`, `supervised`, or the kind of a baseline.
        head: Head of a probe, `FINE_TUNED` or `BASELINE`.
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
        `accuracy`: head -> row -> task -> [mean, std]. `random_scales`: head -> scale -> task -> [mean, std].
    """
    accuracy: dict[str, Rows] = {}
    random_scales: dict[str, Rows] = {}
    for head, row, task in dict.fromkeys((r.head, r.row, r.task) for r in results):
        group = [r for r in results if (r.head, r.row, r.task) == (head, row, task)]
        rows = accuracy.setdefault(head, {})
        if row != "random":
            rows.setdefault(row, {})[task] = mean_and_std(pooled_over_folds(group))
            continue
        scales = {std: [r for r in group if r.init_std == std] for std in dict.fromkeys(r.init_std for r in group)}
        cells = {std: mean_and_std(pooled_over_folds(part)) for std, part in scales.items()}
        for std, cell in cells.items():
            random_scales.setdefault(head, {}).setdefault(str(std), {})[task] = cell
        rows.setdefault("random_best", {})[task] = max(cells.values(), key=lambda cell: cell[0])
        if default_init_std in cells:
            rows.setdefault("random", {})[task] = cells[default_init_std]
    return {"accuracy": accuracy, "random_scales": random_scales}


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


def margin(rows: Rows, task: str, row: str, reference: str = "random_best") -> dict[str, Any] | None:
    """Return by how much the accuracy of a row is above that of a reference row.

    Returns:
        `points`: difference of the means. `std`: standard deviation of the difference of two single runs, not of their
        means: sqrt(std_row² + std_reference²). `deviations`: `points` / `std`. `std` is None where a standard deviation
        is unknown, `deviations` also where both are zero. None where a row is missing.
    """
    if task not in rows.get(row, {}) or task not in rows.get(reference, {}):
        return None
    (mean, row_std), (reference_mean, reference_std) = rows[row][task], rows[reference][task]
    points = mean - reference_mean
    std = None if row_std is None or reference_std is None else math.hypot(row_std, reference_std)
    return {"points": points, "std": std, "deviations": points / std if std else None}


def margins(report: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Return head -> objective -> task -> `margin`, over the best random encoder or over training from scratch.

    Args:
        report: Tables, see `tables`, with `objectives`, their names.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for head, rows in report["accuracy"].items():
        for name in report["objectives"]:
            for task in rows.get(name, {}):
                difference = margin(rows, task, name, REFERENCE.get(head, "random_best"))
                if difference is not None:
                    found.setdefault(head, {}).setdefault(name, {})[task] = difference
    return found


def is_better(difference: dict[str, Any]) -> bool:
    """Whether a margin is at least `MIN_POINTS` and `MIN_DEVIATIONS`."""
    deviations = difference["deviations"]
    return difference["points"] >= MIN_POINTS and deviations is not None and deviations >= MIN_DEVIATIONS


def verdict(report: dict[str, Any], task: str, row: str) -> str:
    """Describe whether the encoders of an objective are better than the best random one on `task`, with each head."""
    accuracy = report["accuracy"]
    better: list[str] = []
    worse: list[str] = []
    details = []
    for head in in_order(accuracy):
        rows = accuracy[head]
        difference = None if head in REFERENCE or head.endswith(SHUFFLED) else margin(rows, task, row)
        if difference is None:
            continue
        (better if is_better(difference) else worse).append(head_title(head))
        details.append(f"{head_title(head)} {rows[row][task][0]:.1f} % ({describe(difference)})")
    if not details:
        return f"{row}, {task}: there are no results of both a pretrained and a random encoder."
    claim = f"by at least {MIN_POINTS:.0f} points and {MIN_DEVIATIONS:.0f} standard deviations"
    sentences = [f"{row}, {task}: {', '.join(details)}."]
    if better:
        sentences.append(f"It beats the best random encoder {claim} with: {', '.join(better)}.")
    if worse:
        sentences.append(f"It does not beat it {claim} with: {', '.join(worse)}.")
    return " ".join([*sentences, *_further_comparisons(accuracy, task, row)])


def describe(difference: dict[str, Any]) -> str:
    """Format a margin as `+22.1 points, 9.8 deviations`."""
    deviations = difference["deviations"]
    return f"{difference['points']:+.1f} points" + ("" if deviations is None else f", {deviations:.1f} deviations")


def _further_comparisons(accuracy: dict[str, Rows], task: str, row: str) -> list[str]:
    """Compare fine-tuning with training from scratch, and the best probe with the baselines."""
    sentences = []
    fine_tuned = margin(accuracy.get(FINE_TUNED, {}), task, row, REFERENCE[FINE_TUNED])
    if fine_tuned is not None:
        mean = accuracy[FINE_TUNED][row][task][0]
        sentences.append(f"Fine-tuned {mean:.1f} % (over training from scratch: {describe(fine_tuned)}).")
    baselines = {kind: cells[task][0] for kind, cells in accuracy.get(BASELINE, {}).items() if task in cells}
    frozen = [
        rows[row][task][0]
        for head, rows in accuracy.items()
        if head not in (FINE_TUNED, BASELINE) and not head.endswith(SHUFFLED) and task in rows.get(row, {})
    ]
    if baselines and frozen:
        kind = max(baselines, key=lambda kind: baselines[kind])
        points = max(frozen) - baselines[kind]
        relation = "above" if points >= 0 else "below"
        sentences.append(f"Its best probe is {abs(points):.1f} points {relation} the best baseline ({kind}).")
    return sentences


HEADS = {
    "linear": "linear",
    "linear_slots": "linear (time slots)",
    "knn": "kNN",
    "attentive": "attentive",
    FINE_TUNED: "fine-tuned",
}
"""Title of each head, in the order of the columns; others follow by their names."""


def head_title(head: str) -> str:
    """Return the title of a column."""
    plain = head.removesuffix(SHUFFLED)
    title = HEADS.get(plain, plain.replace("_", " "))
    return f"{title}, shuffled" if head.endswith(SHUFFLED) else title


def in_order(heads: Iterable[str]) -> list[str]:
    """Return heads in the order of `HEADS`, those with shuffled frames last."""
    order = list(HEADS)

    def position(head: str) -> tuple[bool, int]:
        plain = head.removesuffix(SHUFFLED)
        return head.endswith(SHUFFLED), order.index(plain) if plain in order else len(order)

    return sorted(heads, key=position)


def text_cell(cell: Cell | None) -> str:
    """Format [mean, std] as `70.0 ± 1.0`."""
    if cell is None:
        return "-"
    mean, std = cell
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
