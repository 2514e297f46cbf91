"""Read lists of captions and of questions in the formats of the field's data sets."""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError
from tubelet.data.sources import VIDEO_SUFFIXES

logger = logging.getLogger(__name__)

_VIDEO_KEYS = ("video_id", "videoID", "video", "image_id")
_CAPTION_KEYS = ("caption", "captions", "enCap", "sentence")
_EXAMPLES = 3


@dataclass(frozen=True)
class Captions:
    """The captions of a video; `video` is its identifier in the list."""

    video: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Question:
    """A question about a video.

    Attributes:
        video: Identifier of the video in the list.
        text: The question.
        answer: The right answer; in multiple choice one of `options`.
        type: Kind of question, as in the list, or the first word of the question.
        options: The answers to choose from; empty for an open-ended question.
    """

    video: str
    text: str
    answer: str
    type: str
    options: tuple[str, ...] = ()


def read_captions(path: str, key: str, split: str | None = None) -> tuple[list[Captions], int]:
    """Return the captions of each video, and the number of empty ones, which are left out.

    Formats: MSR-VTT's JSON (`videos`, `sentences`), VATEX's JSON (`videoID`, `enCap`), and a JSON list, a file of JSON
    lines or a CSV file with the columns `video` (or `video_id`) and `caption` (or `captions`, `sentence`).

    Args:
        path: The list.
        key: Key of the option that names it, for messages.
        split: Of MSR-VTT's JSON, the videos of this split only; None for all.

    Raises:
        ConfigError: The list cannot be read, or holds no caption.
    """
    content = _read(path, key)
    splits = {}
    if isinstance(content, dict):
        if not {"sentences", "videos"} <= set(content):
            raise ConfigError(f"{key}: {path}: expected MSR-VTT's keys videos and sentences, or a list of captions")
        splits = {str(video["video_id"]): video.get("split") for video in content["videos"]}
        content = content["sentences"]
    found: dict[str, list[str]] = {}
    empty = 0
    for number, row in enumerate(content, start=1):
        video = _get(row, _VIDEO_KEYS, f"{key}: {path}, entry {number}")
        texts = _get(row, _CAPTION_KEYS, f"{key}: {path}, entry {number}")
        if split is not None and splits.get(str(video)) != split:
            continue
        words = [str(text or "").split() for text in ([texts] if isinstance(texts, str) else texts or [""])]
        if captions := [" ".join(text) for text in words if text]:
            found.setdefault(str(video), []).extend(captions)
        empty += len(words) - len(captions)
    if empty:
        logger.warning("%s: %s: %d empty captions are left out", key, path, empty)
    if not found:
        names = ", ".join(sorted({str(name) for name in splits.values()}))
        remedy = f"; its splits are {names}" if split is not None else ""
        raise ConfigError(f"{key}: {path}: no caption{remedy}")
    return [Captions(video, tuple(texts)) for video, texts in found.items()], empty


def read_questions(path: str, key: str) -> list[Question]:
    """Read questions.

    Formats: the JSON lists of MSVD-QA and MSRVTT-QA (`video_id`, `question`, `answer`, optionally `type`), open-ended,
    and the CSV of NExT-QA (`video`, `question`, `answer`, `type`, `a0`, `a1`, …), multiple choice, whose `answer` is
    the number of the right option. Empty options are left out.

    Args:
        path: The list.
        key: Key of the option that names it, for messages.

    Raises:
        ConfigError: The list cannot be read, holds no question, or an answer is not among its options.
    """
    questions = []
    for number, row in enumerate(_read(path, key), start=1):
        at = f"{key}: {path}, entry {number}"
        video, text, answer = (str(_get(row, names, at)) for names in (_VIDEO_KEYS, ("question",), ("answer",)))
        listed = {name[1:]: str(row[name] or "").strip() for name in _option_names(row)}
        options = {number: option for number, option in listed.items() if option}
        if options:
            if answer not in options:
                raise ConfigError(f"{at}: answer is '{answer}', expected one of the options {', '.join(options)}")
            answer = options[answer]
        if not text.strip() or not answer.strip():
            raise ConfigError(f"{at}: the question or its answer is empty; remove the entry")
        kind = str(row.get("type") or text.split()[0].lower())
        questions.append(Question(video, text, answer, kind, tuple(options.values())))
    if not questions:
        raise ConfigError(f"{key}: {path}: no question")
    return questions


def find_videos(identifiers: Iterable[str], folder: str, key: str) -> dict[str, str]:
    """Return identifier -> path of the video files in a folder and below.

    The file of identifier `x` is named `x`, with or without suffix, `videox` or `vidx`: MSRVTT-QA and MSVD-QA give only
    the number of these. Missing files are reported and left out.

    Raises:
        ConfigError: There is no such folder, none of the files is in it, or two files have the same identifier.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"{key}: {folder} is no folder; give the one with the video files")
    files: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            files.setdefault(path.stem, []).append(path)
    found, missing = {}, []
    for identifier in dict.fromkeys(identifiers):
        plain = Path(identifier).stem if Path(identifier).suffix.lower() in VIDEO_SUFFIXES else identifier
        names = [name for name in (plain, f"video{plain}", f"vid{plain}") if name in files]
        if names:
            if len(paths := files[names[0]]) > 1:
                raise ConfigError(f"{key}: {identifier} may be {paths[0]} or {paths[1]}; remove one of them")
            found[identifier] = str(paths[0])
        else:
            missing.append(identifier)
    if not found:
        raise ConfigError(
            f"{key}: none of the {len(missing)} videos of the list is in {folder}, e.g. {missing[0]}; the name of a "
            "file has to be the identifier in the list"
        )
    if missing:
        examples = ", ".join(missing[:_EXAMPLES])
        logger.warning("%s: %d of %d videos are not in %s, e.g. %s", key, len(missing), len(missing) + len(found),
                       folder, examples)  # fmt: skip
    return found


def frequent_answers(answers: Iterable[str], number: int) -> list[str]:
    """Return the most frequent answers, at most `number`, the most frequent one first."""
    return [answer for answer, _ in Counter(answers).most_common(number)]


def _read(path: str, key: str) -> Any:
    """Return the content of a JSON file, or the rows of a file of JSON lines or a CSV file."""
    suffix = Path(path).suffix.lower()
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except OSError as error:
        raise ConfigError(f"{key}: {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{key}: {path}: the text is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{key}: {path}, line {error.lineno}: this is no JSON: {error.msg}") from None


def _get(row: Any, names: Sequence[str], at: str) -> Any:
    """Return the value of the first of `names` that a row has."""
    for name in names if isinstance(row, dict) else ():
        if row.get(name) is not None:
            return row[name]
    raise ConfigError(f"{at}: no {' or '.join(names)}")


def _option_names(row: dict[str, Any]) -> list[str]:
    return sorted((name for name in row if name[:1] == "a" and name[1:].isdigit()), key=lambda name: int(name[1:]))
