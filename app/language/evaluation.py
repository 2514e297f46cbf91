"""Measure a trained model on the validation videos: `results.json`, `predictions.json`, `examples.html`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from app.language.data import Lists, Record, swap_videos
from app.language.model import Model
from app.language.retrieval import (
    class_texts,
    embed_texts,
    embed_videos,
    nearest_texts,
    zero_shot_accuracy,
    zero_shot_records,
)
from app.language.retrieval import measure as retrieval
from app.language.texts import choose_answers, measure, write_examples, write_texts
from app.language.videos import Run
from tubelet.config import UserError
from tubelet.data import evenly_spaced
from tubelet.objectives.video_text_alignment import VideoTextAlignment
from tubelet.objectives.video_to_answer import VideoToAnswer
from tubelet.objectives.video_to_text import VideoToText
from tubelet.runtime.files import write_json


def evaluate(model: Model, lists: Lists, num_train: int, run: Run) -> None:
    """Measure the model on the validation videos and write `results.json`, which comes last."""
    options = run.options
    records = run.features.readable(lists.val)
    further = {name: run.features.readable(listed) for name, listed in lists.further.items()}
    if isinstance(model, VideoTextAlignment):
        results, num_val, excluded = evaluate_retrieval(model, records, further, run)
    else:
        results, num_val, excluded = evaluate_texts(model, records, further, lists.answers, run)
    if run.world.is_main:
        excluded = {**run.features.excluded, **excluded}
        results |= {
            "num_train": num_train,
            "num_val": num_val,
            "lists": lists.count(run.text),
            "excluded": [{"path": path, "reason": reason} for path, reason in sorted(excluded.items())],
            "seed": options.meta.seed,
        }
        write_json(Path(options.folder) / "results.json", results)


def evaluate_texts(
    model: VideoToText | VideoToAnswer,
    records: list[Record],
    further: Mapping[str, list[Record]],
    answers: list[str],
    run: Run,
) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Write texts about the videos, and `predictions.json` and `examples.html`.

    Returns:
        Metrics, the number of texts, and the reason for each unreadable file.
    """
    options, folder = run.options, Path(run.options.folder)

    def texts_about(shown: list[Record]) -> tuple[dict[int, str], dict[str, str]]:
        if isinstance(model, VideoToAnswer):
            return choose_answers(model, shown, answers, run)
        return write_texts(model, shown, run)

    written, unreadable = texts_about(records) if records else ({}, {})
    _check_any(written, unreadable, "data.dataset_val")
    results: dict[str, Any] = measure(written, records, options.task)
    results["further"] = {}
    for name, listed in further.items():
        others, more = texts_about(listed) if listed else ({}, {})
        _check_any(others, more, f"evaluation.lists.{name}")
        results["further"][name] = measure(others, listed, options.task)
        unreadable |= more
    if options.evaluation.swap_videos:
        results["swapped_videos"] = measure(texts_about(swap_videos(records))[0], records, options.task)
    if run.world.is_main:
        rows = [(records[i], written[i]) for i in sorted(written)]
        write_json(
            folder / "predictions.json",
            [{"video": r.path, "prompt": r.prompt, "references": r.references, "text": t} for r, t in rows],
        )
        shown = [rows[i] for i in evenly_spaced(len(rows), options.evaluation.examples).tolist()]
        write_examples(folder / "examples.html", shown, options)
    return results, len(written), unreadable


def evaluate_retrieval(
    model: VideoTextAlignment, records: list[Record], further: Mapping[str, list[Record]], run: Run
) -> tuple[dict[str, Any], int, dict[str, str]]:
    """Rank videos and texts, and write `examples.html`.

    Returns:
        Metrics, the number of videos, and the reason for each unreadable file.
    """
    options = run.options
    unreadable: dict[str, str] = {}

    def embed(listed: list[Record], key: str) -> dict[int, Tensor]:
        embedded, more = embed_videos(model, listed, run) if listed else ({}, {})
        _check_any(embedded, more, key)
        unreadable.update(more)
        return embedded

    embedded = embed(records, "data.dataset_val")
    texts = references(records)
    vectors = embed_texts(model, texts, run)
    results: dict[str, Any] = retrieval(embedded, vectors, records)
    results["further"] = {}
    for name, listed in further.items():
        others = embed(listed, f"evaluation.lists.{name}")
        results["further"][name] = retrieval(others, embed_texts(model, references(listed), run), listed)
    if options.evaluation.swap_videos:
        swapped, _ = embed_videos(model, swap_videos(records), run)
        results["swapped_videos"] = retrieval(swapped, vectors, records)
    if (zero_shot := options.evaluation.zero_shot) is not None:
        labelled = run.features.readable(zero_shot_records(zero_shot))
        classified = embed(labelled, "evaluation.zero_shot.dataset")
        names = embed_texts(model, class_texts(zero_shot), run)
        results["zero_shot_top1"] = zero_shot_accuracy(classified, names, labelled)
        results["num_zero_shot"] = len(classified)
    if run.world.is_main:
        indices = sorted(embedded)
        shown = [indices[i] for i in evenly_spaced(len(indices), options.evaluation.examples).tolist()]
        nearest = nearest_texts([embedded[i] for i in shown], vectors, texts)
        rows = [(records[i], text) for i, text in zip(shown, nearest, strict=True)]
        write_examples(Path(options.folder) / "examples.html", rows, options)
    return results, len(embedded), unreadable


def references(records: Sequence[Record]) -> list[str]:
    """Return all right texts, record by record."""
    return [reference for record in records for reference in record.references]


def _check_any(found: dict[int, Any], unreadable: dict[str, str], key: str) -> None:
    if not found:
        raise UserError(f"{key}: none of its videos can be read: {unreadable}")
