"""Single results into the tables of a report, and what they say about pretraining."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Cell = list  # [mean, standard deviation or None], in percent
Table = dict[str, dict[str, Cell]]

BAR_POINTS = 10.0
BAR_DEVIATIONS = 3.0


@dataclass(frozen=True)
class Result:
    """One read-out of one encoder (or floor) on one task.

    row: `random`, `pretrained`, `supervised`, `floor_frame`, ...; head: `probe` or `linear`; seed: of the encoder;
    head_seed: of the read-out; init_std: of a random encoder; top1: percent of the `count` test videos of `fold`.
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


def tables(results: Sequence[Result], own_init_std: float | None) -> dict[str, Any]:
    """`probe` and `linear`: row -> task -> [mean, std]; `random_scales`: head -> scale -> task -> [mean, std].

    Folds are pooled first: right answers over all their test videos. Mean and sample standard deviation are then over
    the seeds of encoder and read-out; the deviation of a single result is None. `random` is the encoder at
    `own_init_std`, `random_best` for each task the scale with the highest mean, which needs the test videos to be known
    and so favours the random encoder.
    """
    report: dict[str, Any] = {"probe": {}, "linear": {}, "random_scales": {"probe": {}, "linear": {}}}
    for head, row, task in dict.fromkeys((r.head, r.row, r.task) for r in results):
        alike = [r for r in results if (r.head, r.row, r.task) == (head, row, task)]
        if row != "random":
            report[head].setdefault(row, {})[task] = mean_and_std(pooled_over_folds(alike))
            continue
        scales = {std: [r for r in alike if r.init_std == std] for std in dict.fromkeys(r.init_std for r in alike)}
        cells = {std: mean_and_std(pooled_over_folds(part)) for std, part in scales.items()}
        for std, cell in cells.items():
            report["random_scales"][head].setdefault(str(std), {})[task] = cell
        report[head].setdefault("random_best", {})[task] = max(cells.values(), key=lambda cell: cell[0])
        if own_init_std in cells:
            report[head].setdefault("random", {})[task] = cells[own_init_std]
    return report


def pooled_over_folds(results: Iterable[Result]) -> list[float]:
    """Accuracy in percent for each pair of seeds: all folds' right answers over all their test videos."""
    by_seeds: dict[tuple, list[Result]] = {}
    for result in results:
        by_seeds.setdefault((result.seed, result.head_seed), []).append(result)
    return [sum(r.top1 * r.count for r in part) / sum(r.count for r in part) for part in by_seeds.values()]


def mean_and_std(values: Sequence[float]) -> Cell:
    """[mean, sample standard deviation]; None where one value says nothing about it."""
    return [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]


def standard_error(percent: float, count: int) -> float:
    """Of a share in percent that was counted on `count` videos (binomial): how much other test videos would move it."""
    return math.sqrt(percent * (100 - percent) / count)


def standard_errors(results: Sequence[Result]) -> dict[str, dict[str, dict[str, float]]]:
    """head -> row -> task -> `standard_error` of the mean accuracy, in points; for rows without init scales."""
    errors: dict[str, dict[str, dict[str, float]]] = {}
    for head, row, task in dict.fromkeys((r.head, r.row, r.task) for r in results if r.init_std is None):
        alike = [r for r in results if (r.head, r.row, r.task) == (head, row, task)]
        videos = {r.fold: r.count for r in alike}
        percent = statistics.fmean(pooled_over_folds(alike))
        errors.setdefault(head, {}).setdefault(row, {})[task] = standard_error(percent, sum(videos.values()))
    return errors


def margin(table: Table, task: str, ours: str = "pretrained", theirs: str = "random_best") -> dict[str, Any] | None:
    """How far `ours` is above `theirs`: in points, and in standard deviations of the difference of two single runs.

    The deviation is sqrt(std_ours² + std_theirs²) of single runs, not of their means: the strictest usual reading. None
    where one of the rows is missing; `deviations` is None where a deviation is unknown or both are zero.
    """
    if task not in table.get(ours, {}) or task not in table.get(theirs, {}):
        return None
    (our_mean, our_std), (their_mean, their_std) = table[ours][task], table[theirs][task]
    points = our_mean - their_mean
    known = our_std is not None and their_std is not None
    std = math.hypot(our_std, their_std) if known else None
    return {"points": points, "std": std, "deviations": points / std if std else None}


def verdict(report: dict[str, Any], task: str) -> str:
    """Sentences that say whether the pretrained encoder leaves the strongest random one behind on `task`."""
    table = report["probe"]
    found = margin(table, task)
    if found is None:
        return f"{task}: no comparison of the pretrained with a random encoder was measured."
    (ours, _), (theirs, _) = table["pretrained"][task], table["random_best"][task]
    met = found["points"] >= BAR_POINTS and (found["deviations"] or -math.inf) >= BAR_DEVIATIONS
    if found["deviations"] is None:
        measure = "one run each, so that nothing is known about its deviation"
    else:
        measure = (
            f"{found['deviations']:.1f} standard deviations (sqrt(std² pretrained + std² random) of single runs = "
            f"{found['std']:.1f} points)"
        )
    beats = "beats" if met else "does not beat"
    return (
        f"{task}, attentive probe: pretrained {ours:.1f} %, strongest random encoder {theirs:.1f} %: "
        f"{found['points']:+.1f} points, {measure}. The pretrained encoder {beats} the strongest random one by at "
        f"least {BAR_POINTS:.0f} points and {BAR_DEVIATIONS:.0f} standard deviations.{_others(table, task)}"
    )


def _others(table: Table, task: str) -> str:
    """What else the pretrained encoder should not be below: random with few labels, and the frame differences."""
    sentences = []
    few = f"{task}_few"
    for what, theirs, where in (
        ("the strongest random encoder with few labels", "random_best", few),
        ("the floor of frame differences", "floor_difference", task),
    ):
        if (found := margin(table, where, theirs=theirs)) is not None:
            word = "above" if found["points"] > 0 else "below" if found["points"] < 0 else "level with"
            sentences.append(f" It is {word} {what} ({found['points']:+.1f} points).")
    return "".join(sentences)


ROWS = {
    "random": "frozen random encoder, its own initialisation",
    "random_best": "frozen random encoder, best of the initialisation scales",
    "pretrained": "frozen pretrained encoder",
    "supervised": "same encoder, trained from scratch with the labels",
    "floor_frame": "no network: the middle frame",
    "floor_difference": "no network: absolute frame differences",
    "floor_metadata": "no network: size and length of the file",
}


def rows_of(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(head, row, title) of a table's lines, in their order."""
    lines = []
    for row, title in ROWS.items():
        for head in ("probe", "linear"):
            if row in report.get(head, {}):
                alone = row not in ("random", "random_best", "pretrained")
                lines.append((head, row, title if alone else f"{title}, {HEADS[head]}"))
    return lines


HEADS = {"probe": "attentive probe", "linear": "linear read-out"}

MEANING = {
    "attentive probe": "a learned query attends to all tokens of the frozen encoder, then a linear layer",
    "linear read-out": "a linear layer on the mean of the frozen encoder's tokens",
    "frozen random encoder": "weights as drawn, never trained: what architecture and probe reach without pretraining",
    "frozen pretrained encoder": "pretrained without labels, then frozen; only the read-out sees labels",
    "trained from scratch": "the same encoder and attentive read-out, all of it trained with these labels only",
    "middle frame": "logistic regression on the colours of one frame in 16 × 16 cells: what needs no motion",
    "absolute frame differences": "logistic regression on |difference| of frames in 8 × 8 cells: where, not which way, "
    "something moves",
    "size and length": "logistic regression on width, height and length of the file: what no picture is needed for",
}
"""What the words in the rows' titles say."""


def text_table(report: dict[str, Any]) -> str:
    """The table in aligned plain text: a line for each row and read-out, a column for each task."""
    lines = rows_of(report)
    tasks = tasks_of(report)
    grid = [["top-1 in %", *(task.replace("_", " ") for task in tasks)]]
    grid += [[title, *(text_cell(report[head][row].get(task)) for task in tasks)] for head, row, title in lines]
    widths = [max(len(line[i]) for line in grid) for i in range(len(grid[0]))]
    rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in grid]
    rule = "-" * len(rows[0])
    return "\n".join([rows[0], rule, *rows[1:], rule])


def tasks_of(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(task for head in HEADS for row in report.get(head, {}).values() for task in row))


def text_cell(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    mean, std = cell
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
