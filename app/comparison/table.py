"""Measurements of the runs, and tables of them."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tubelet.data.scenes.language import QUESTION_TYPES, parse
from tubelet.data.scenes.scene import ATTRIBUTES
from tubelet.runtime.files import read_json

Measured = dict[str, list[dict[str, float]]]
"""Row -> the measurements of each seed, in percent."""

COMBINATIONS = "combinations"
"""Name of the list of scenes with unseen combinations, in `evaluation.lists`."""
COLUMNS: dict[str, tuple[str, ...]] = {
    "captions": ("all", "swapped", COMBINATIONS, *ATTRIBUTES),
    "answers": ("all", "swapped", COMBINATIONS, *QUESTION_TYPES),
    "retrieval": ("R@1", "R@5", "R@10", "swapped", COMBINATIONS),
    "accuracy": ("top-1",),
}
"""Columns by kind of task, the most important one first."""
LEGENDS = {
    "captions": "captions with all attributes right, with exchanged videos, of unseen combinations; each attribute",
    "answers": "right answers, with exchanged videos, of unseen combinations; each type of question",
    "retrieval": "video from caption: recall; R@1 with exchanged videos, of unseen combinations",
    "accuracy": "top-1 accuracy",
}


def measurements(folder: Path, kind: str) -> dict[str, float]:
    """Return the measurements of a run: column -> percent."""
    results: dict[str, Any] = read_json(folder / "results.json")
    if kind == "accuracy":
        return {"top-1": results["top1"]}
    keys = {"captions": "exact_match", "answers": "accuracy", "retrieval": "text_to_video_r1"}
    key, first = keys[kind], COLUMNS[kind][0]
    found = {
        first: results[key],
        "swapped": results["swapped_videos"][key],
        COMBINATIONS: results["further"][COMBINATIONS][key],
    }
    if kind == "retrieval":
        return found | {f"R@{k}": results[f"text_to_video_r{k}"] for k in (5, 10)}
    parts = attributes(read_json(folder / "predictions.json")) if kind == "captions" else results["by_type"]
    return found | parts


def best_retrieval(scenes: Path) -> dict[str, float]:
    """Return the recall of a perfect model, which can only guess among scenes with equal captions."""
    columns = {"R@1": ("test", 1), "R@5": ("test", 5), "R@10": ("test", 10), COMBINATIONS: ("test_combinations", 1)}
    best = {}
    for column, (split, k) in columns.items():
        sentences = read_json(scenes / f"captions_{split}.json")["sentences"]
        videos = Counter(sentence["caption"] for sentence in sentences)
        best[column] = 100 * sum(min(1, k / videos[s["caption"]]) for s in sentences) / len(sentences)
    return best


def attributes(predictions: list[dict[str, Any]]) -> dict[str, float]:
    """Return in how many percent of the captions each attribute is right; a text that is no caption has none right."""
    right = dict.fromkeys(ATTRIBUTES, 0)
    for prediction in predictions:
        scene, said = parse(prediction["references"][0]), parse(prediction["text"])
        for name in ATTRIBUTES:
            right[name] += said is not None and getattr(said, name) == getattr(scene, name)
    return {name: 100 * number / len(predictions) for name, number in right.items()}


def tables(measured: Mapping[str, Measured], kinds: Mapping[str, str]) -> str:
    """Return the tables in Markdown: one of all tasks, and one of each that has several columns.

    Cells are the mean over the seeds and their standard deviation.

    Args:
        measured: Task -> row -> measurements.
        kinds: Kind of each task.
    """
    rows = list(dict.fromkeys(row for of_task in measured.values() for row in of_task))
    first = {task: COLUMNS[kinds[task]][0] for task in measured}
    cells = [
        [f"{task}, {first[task]}", *(_cell(of_task.get(row, []), first[task]) for row in rows)]
        for task, of_task in measured.items()
    ]
    parts = [_table("All tasks, in percent", ["", *rows], cells)]
    for task, of_task in measured.items():
        if len(columns := COLUMNS[kinds[task]]) > 1:
            cells = [[row, *(_cell(seeds, column) for column in columns)] for row, seeds in of_task.items()]
            parts.append(_table(f"{task}: {LEGENDS[kinds[task]]}", ["", *columns], cells))
    return "\n".join(parts)


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows), ""])


def _cell(seeds: Sequence[Mapping[str, float]], column: str) -> str:
    values = [seed[column] for seed in seeds if column in seed]
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
