"""The records of captioning, question answering and retrieval, for training and for evaluation."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app.language.options import Options
from tubelet.config import ConfigError
from tubelet.language.annotations import find_videos, frequent_answers, read_captions, read_questions
from tubelet.language.dataset import TextSample
from tubelet.language.tokenizer import IGNORED, TextEncoder


@dataclass(frozen=True)
class Record:
    """What is evaluated.

    Attributes:
        path: The video file.
        prompt: What the model is asked.
        references: Right texts.
        type: Kind of question; `caption` of a caption.
        options: The answers to choose from; empty where the answer is open.
    """

    path: str
    prompt: str
    references: tuple[str, ...]
    type: str
    options: tuple[str, ...] = ()

    def samples(self) -> list[TextSample]:
        """Return one sample for each reference."""
        return [TextSample(self.path, self.prompt, text) for text in self.references]


@dataclass(frozen=True)
class Lists:
    """What `data.dataset_train`, `data.dataset_val` and `evaluation.lists` hold.

    Attributes:
        train: Records of training.
        val: Records of validation.
        further: Records of `evaluation.lists`.
        answers: With classified answers, those to choose from.
        left_out: For each list, how many listed videos are missing, and how many captions are empty.
        folder: The run folder, for messages.
    """

    train: list[Record]
    val: list[Record]
    further: dict[str, list[Record]]
    answers: list[str]
    left_out: dict[str, dict[str, int]]
    folder: str

    def texts(self) -> list[str]:
        """Return the texts of training that a tokenizer is learned from."""
        return [text for record in self.train for text in (record.prompt, *record.references, *record.options)]

    def train_samples(self) -> list[TextSample]:
        """Return the training samples, one for each text; with classified answers, those whose answer can be given."""
        samples = [sample for record in self.train for sample in record.samples()]
        if not self.answers:
            return samples
        number = {answer: i for i, answer in enumerate(self.answers)}
        numbered = [replace(sample, answer=number.get(sample.target, IGNORED)) for sample in samples]
        return [sample for sample in numbered if sample.answer != IGNORED]

    def count(self, text: TextEncoder) -> dict[str, dict[str, int]]:
        """Return, for each list, how many videos, texts and answers are missing, cut or unknown."""
        counts = {}
        for part, records in {"train": self.train, "val": self.val, **self.further}.items():
            targets = [t for record in records for t in (record.options or record.references)]
            counts[part] = self.left_out[part] | text.count([record.prompt for record in records], targets)
            if self.answers:
                known = set(self.answers)
                counts[part]["answers_outside_vocabulary"] = sum(r.references[0] not in known for r in records)
        return counts

    def metadata(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        rows = [[Path(r.path).name, r.prompt, r.references, r.options] for r in self.train]
        return {"lists": hashlib.sha256(json.dumps(rows).encode()).hexdigest()}

    def load_metadata(self, metadata: dict[str, Any]) -> None:
        """Raise ConfigError where a checkpoint was made with other videos or texts."""
        if metadata["lists"] != self.metadata()["lists"]:
            raise ConfigError(
                f"{self.folder} holds a run on other videos or texts than data.dataset_train and data.videos name now; "
                "choose another folder=…, or remove that one"
            )


def read_lists(options: Options) -> Lists:
    """Read the lists of `data` and of `evaluation.lists`. Raises ConfigError where one cannot be used."""
    data = options.data
    lists = {
        "train": (data.dataset_train, "data.dataset_train", data.split_train),
        "val": (data.dataset_val, "data.dataset_val", data.split_val),
        **{name: (path, f"evaluation.lists.{name}", None) for name, path in options.evaluation.lists.items()},
    }
    read = _questions if options.task == "question_answering" else _captions
    records, left_out = {}, {}
    for part, (path, key, split) in lists.items():
        listed, empty = read(options, path, key, split)
        files = find_videos((record.path for record in listed), data.videos, "data.videos")
        records[part] = [replace(record, path=files[record.path]) for record in listed if record.path in files]
        missing = len({record.path for record in listed} - files.keys())
        left_out[part] = {"missing_videos": missing, "empty_captions": empty}
    answers = []
    if options.answers.kind == "classified":
        if any(record.options for listed in records.values() for record in listed):
            raise ConfigError("answers.kind: classified does not read the options of multiple choice; take generated")
        answers = frequent_answers((r.references[0] for r in records["train"]), options.answers.vocabulary)
    train, val = records.pop("train"), records.pop("val")
    return Lists(train, val, records, answers, left_out, options.folder)


def swap_videos(records: Sequence[Record]) -> list[Record]:
    """Give the texts of each video to the next one, so that no text is about its video."""
    paths = list(dict.fromkeys(record.path for record in records))
    following = dict(zip(paths, [*paths[1:], paths[0]], strict=True))
    return [replace(record, path=following[record.path]) for record in records]


def _captions(options: Options, path: str, key: str, split: str | None) -> tuple[list[Record], int]:
    listed, empty = read_captions(path, key, split)
    return [Record(captions.video, options.text.prompt, captions.texts, "caption") for captions in listed], empty


def _questions(options: Options, path: str, key: str, split: str | None) -> tuple[list[Record], int]:
    prompt = options.text.prompt or "{question}"
    listed = read_questions(path, key)
    return [Record(q.video, prompt.replace("{question}", q.text), (q.answer,), q.type, q.options) for q in listed], 0
