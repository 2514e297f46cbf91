"""Runs of app.language and what they write."""

import json
from pathlib import Path

from app.language import train as program
from tubelet.config import check
from tubelet.grid import ClipShape
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World

ENCODER = {"name": "vit_tiny", "embed_dim": 24, "depth": 2, "num_heads": 2}
CLIP = ClipShape(4, 32, 16, 2)
TASKS = ("captioning", "question_answering", "retrieval")
LISTS = {"captioning": "captions", "question_answering": "questions", "retrieval": "captions"}
BATCH = {"captioning": 6, "question_answering": 18, "retrieval": 6}  # four steps in an epoch


def run(raw):
    program.main(check(raw, program.Options, "test.yaml"), World())
    return results(raw["folder"])


def results(folder):
    return json.loads((Path(folder) / "results.json").read_text())


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def last_weights(folder):
    return checkpoint.read(checkpoint.newest(Path(folder) / "checkpoints")).weights


def predictions(folder):
    return [row["text"] for row in json.loads((Path(folder) / "predictions.json").read_text())]


def edited(path, target, change):
    """Write a changed copy of a JSON list; return its path."""
    content = json.loads(Path(path).read_text())
    target.write_text(json.dumps(change(content) or content))
    return str(target)
