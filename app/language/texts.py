"""Write texts about videos and measure them: metrics of captions, accuracies of answers."""

import html
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from app.language.data import Record
from app.language.options import Options
from app.language.videos import Run, map_records, picture
from tubelet.data import Batch
from tubelet.language.metrics import caption_metrics, normalized
from tubelet.language.prefix_lm import PrefixLanguageModel
from tubelet.language.tokenizer import TextEncoder
from tubelet.objectives.video_to_answer import VideoToAnswer
from tubelet.objectives.video_to_text import VideoToText
from tubelet.runtime.files import write_atomic
from tubelet.runtime.seeds import seed_for


def write_texts(model: VideoToText, records: Sequence[Record], run: Run) -> tuple[dict[int, str], dict[str, str]]:
    """Return the text for each record, by index, and the reason for each video that could not be read.

    With options to choose from, the text is the most probable one.
    """
    options, text = run.options, run.text

    def write(batch: Batch) -> list[str]:
        indices = batch.indices.tolist()
        prefix, (prompt, used, _) = model.prefix(batch), model.text(batch)
        written = [""] * len(indices)
        choices = [records[i].options for i in indices]
        if open_ended := [row for row, listed in enumerate(choices) if not listed]:
            seeds = [seed_for(options.meta.seed, "decoding", indices[row]) for row in open_ended]
            arguments = options.decoding.arguments(options.text.max_target, seeds)
            ids = model.language_model.generate(prefix[open_ended], prompt[open_ended], used[open_ended], **arguments)
            for row, answer in zip(open_ended, text.decode(ids), strict=True):
                written[row] = answer
        if any(choices):
            for row, answer in _most_probable(model.language_model, prefix, prompt, used, choices, text).items():
                written[row] = answer
        return written

    return map_records(write, model, records, run)


def choose_answers(
    model: VideoToAnswer, records: Sequence[Record], answers: Sequence[str], run: Run
) -> tuple[dict[int, str], dict[str, str]]:
    """Return the most probable answer to each question, by index, and the reason for each unreadable video."""
    return map_records(lambda batch: [answers[number] for number in model.choose(batch)], model, records, run)


def _most_probable(
    language_model: PrefixLanguageModel,
    prefix: Tensor,
    prompt: Tensor,
    used: Tensor,
    options: Sequence[Sequence[str]],
    text: TextEncoder,
) -> dict[int, str]:
    """Return the most probable option of each row that has any."""
    best: dict[int, tuple[float, str]] = {}
    for number in range(max(map(len, options))):
        rows = [i for i, row in enumerate(options) if number < len(row)]
        target = text.targets([options[i][number] for i in rows]).to(prefix.device)
        likelihood = language_model.log_likelihood(prefix[rows], prompt[rows], used[rows], target)
        for i, value in zip(rows, likelihood.tolist(), strict=True):
            if i not in best or value > best[i][0]:
                best[i] = value, options[i][number]
    return {i: answer for i, (_, answer) in best.items()}


def measure(written: dict[int, str], records: Sequence[Record], task: str) -> dict[str, Any]:
    """Return the metrics of the texts: those of captions, or the accuracy of answers, also by type of question."""
    indices = sorted(written)
    if task == "captioning":
        return caption_metrics([written[i] for i in indices], [records[i].references for i in indices])
    hits: dict[str, list[bool]] = defaultdict(list)
    for i in indices:
        hits[records[i].type].append(normalized(written[i]) == normalized(records[i].references[0]))
    every = [hit for values in hits.values() for hit in values]
    return {
        "accuracy": 100 * sum(every) / len(every),
        "by_type": {name: 100 * sum(values) / len(values) for name, values in sorted(hits.items())},
        "questions_by_type": dict(sorted(Counter(records[i].type for i in indices).items())),
    }


def write_examples(path: Path, examples: Sequence[tuple[Record, str]], options: Options) -> None:
    """Write a page of videos with what was asked, the references and the text of the model."""
    sections = []
    for record, text in examples:
        same = normalized(text) in map(normalized, record.references)
        lines = [f"<b>{html.escape(record.prompt)}</b>"] if record.prompt else []
        lines += [html.escape(reference) for reference in record.references[:5]]
        verdict, style = ("equal to a reference", "same") if same else ("differs", "other")
        lines.append(f'<p class="{style}">{html.escape(text)} <i>({verdict})</i></p>')
        image = f'<img src="{picture(options, record.path)}" alt="{html.escape(record.path)}">'
        sections.append(f"<section>{image}<div>{'<br>'.join(lines)}</div></section>")
    write_atomic(path, _PAGE.format(rows="\n".join(sections)))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Examples</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto; padding: 1rem; }}
section {{ display: flex; flex-wrap: wrap; gap: 1rem; margin: 1rem 0; }}
img {{ width: 128px; image-rendering: pixelated; align-self: start; }}
div {{ flex: 1 1 20rem; }}
.same {{ color: #2a8a3e; }} .other {{ color: #c05020; }}
</style></head><body><h1>Examples</h1>
{rows}
</body></html>
"""
