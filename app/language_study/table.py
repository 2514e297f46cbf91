"""Measurements of the runs, and tables of them."""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from tubelet.data.scenes.language import QUESTION_TYPES, parse
from tubelet.data.scenes.scene import ATTRIBUTES
from tubelet.runtime.files import read_json

Measured = dict[str, list[dict[str, float]]]
"""Row -> the measurements of each seed, in percent."""

COMBINATIONS = "combinations"
_CAPTIONS = ("all", "swapped", COMBINATIONS, *ATTRIBUTES)
_ANSWERS = ("all", "swapped", COMBINATIONS, *QUESTION_TYPES)
_RETRIEVAL = ("r1", "r5", "r10", "swapped", COMBINATIONS)
COLUMNS = {"captions": _CAPTIONS, "answers": _ANSWERS, "retrieval": _RETRIEVAL}
TITLES = {
    "captions": "Captions: all attributes right, with the videos swapped, of unseen combinations; each attribute",
    "answers": "Answers: all questions, with the videos swapped, of unseen combinations; each type",
    "retrieval": "Retrieval, video from caption among 500: recall; R@1 with the videos swapped, of unseen combinations",
}


def measurements(folder: Path, kind: str) -> dict[str, float]:
    """Return the measurements of a run: column -> percent."""
    results: dict[str, Any] = read_json(folder / "results.json")
    swapped, combinations = results["swapped_videos"], results["lists"][COMBINATIONS]
    if kind == "retrieval":
        recalls = {name: results[f"text_to_video_{name}"] for name in ("r1", "r5", "r10")}
        of_others = {"swapped": swapped, COMBINATIONS: combinations}
        return recalls | {name: other["text_to_video_r1"] for name, other in of_others.items()}
    key = "exact_match" if kind == "captions" else "accuracy"
    parts = attributes(read_json(folder / "predictions.json")) if kind == "captions" else results["by_type"]
    return {"all": results[key], "swapped": swapped[key], COMBINATIONS: combinations[key], **parts}


def best_retrieval(scenes: Path) -> dict[str, float]:
    """Return the recall of a perfect model, which can only guess among scenes with equal captions."""
    columns = {"r1": ("test", 1), "r5": ("test", 5), "r10": ("test", 10), COMBINATIONS: ("test_combinations", 1)}
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


def tables(measured: dict[str, Measured]) -> str:
    """Return a table in Markdown for each task. Cells are the mean over the seeds and their standard deviation."""
    parts = []
    for kind, rows in measured.items():
        columns = COLUMNS[kind]
        lines = [f"**{TITLES[kind]}**", "", f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for row, seeds in rows.items():
            cells = [_cell([seed[column] for seed in seeds if column in seed]) for column in columns]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        parts.append("\n".join([*lines, ""]))
    return "\n".join(parts)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"
