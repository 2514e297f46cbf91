"""Rows, columns and titles of the tables of a study, and the tables as plain text and Markdown."""

from collections.abc import Sequence
from typing import Any

from tubelet.report import aggregate
from tubelet.report.aggregate import BASELINE, FINE_TUNED
from tubelet.runtime.text import text_table

REFERENCES = {
    "random_best": "random, best initialization scale",
    "random": "random, default initialization",
    "supervised": "from scratch with labels",
}
"""Title of each row below the objectives."""
BASELINES = {"frame": "middle frame", "difference": "frame differences", "metadata": "size and length of the file"}

DESCRIPTIONS = {
    "linear": "a linear layer on the standardized mean token of the frozen encoder",
    "linear_slots": "a linear layer on the mean tokens of the time slots, which keep their order",
    "knn": "a vote of the labeled clips with the nearest features; nothing is trained",
    "attentive": "a learned query attends to all tokens of the frozen encoder, then a linear layer",
    FINE_TUNED: "encoder and head are trained with the labels, from the pretrained weights or from scratch",
}
"""Explanation of each head."""
DESCRIPTIONS_OF_BASELINES = {
    "frame": "logistic regression on the colors of one frame in 16 × 16 cells: what needs no motion",
    "difference": "logistic regression on the absolute differences of frames in 8 × 8 cells: where something moves, "
    "but not in which direction",
    "metadata": "logistic regression on width, height and length of the video: what needs no content",
}

COSTS = {
    "gflop_per_clip": ("GFLOP/clip", "{:.3g}"),
    "clips_per_second": ("clips/s", "{:.0f}"),
    "steps": ("steps", "{:.0f}"),
    "clips": ("clips seen", "{:,.0f}"),
    "flops": ("TFLOP", "{:.3g}"),
    "seconds": ("minutes", "{:.1f}"),
}
"""Title and format of each column of the table of costs."""
UNITS = {"flops": 1e12, "seconds": 60.0}


def rows_of(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (row, title) of each line of a data set's table: the objectives, then what they are compared with."""
    found = {row for head, rows in data["accuracy"].items() if head != BASELINE for row in rows}
    titled = {name: name for name in data["objectives"]} | REFERENCES
    return [(row, title) for row, title in titled.items() if row in found]


def heads_of(data: dict[str, Any], task: str) -> list[str]:
    """Return the heads with results on a task, in the order of the columns."""
    return aggregate.in_order(
        head
        for head, rows in data["accuracy"].items()
        if head != BASELINE and any(task in cells for cells in rows.values())
    )


def cell(data: dict[str, Any], head: str, row: str, task: str) -> list | None:
    """Return [mean, std]; None where there is no result."""
    return data["accuracy"].get(head, {}).get(row, {}).get(task)


def baselines_of(data: dict[str, Any], task: str) -> dict[str, list]:
    """Return the accuracy of each baseline on a task, by its title."""
    rows = data["accuracy"].get(BASELINE, {})
    return {BASELINES.get(kind, kind): cells[task] for kind, cells in rows.items() if task in cells}


def baselines_text(data: dict[str, Any], task: str) -> str:
    """Return the accuracy of the baselines in one line; empty without any."""
    listed = (f"{title} {aggregate.text_cell(found)}" for title, found in baselines_of(data, task).items())
    return ", ".join(listed)


def task_title(task: str) -> str:
    return task.replace("_", " ")


def accuracy_table(data: dict[str, Any], task: str) -> list[list[str]]:
    """Return the cells of a task's table, header first: a line for each row, a column for each head."""
    heads = heads_of(data, task)
    lines = [
        [title, *(aggregate.text_cell(cell(data, head, row, task)) for head in heads)] for row, title in rows_of(data)
    ]
    shown = [line for line in lines if any(text != "-" for text in line[1:])]
    return [[task_title(task), *map(aggregate.head_title, heads)], *shown]


def cost_table(data: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the table of costs, header first; empty where nothing was measured."""
    costs = data.get("cost", {})
    if not costs:
        return []
    lines = [
        [
            name,
            *(
                "-" if values[key] is None else form.format(values[key] / UNITS.get(key, 1.0))
                for key, (_, form) in COSTS.items()
            ),
        ]
        for name, values in costs.items()
    ]
    return [["objective", *(title for title, _ in COSTS.values())], *lines]


def plain_text(study: dict[str, Any]) -> str:
    """Return all tables and conclusions for the terminal."""
    parts = []
    for name, data in study["datasets"].items():
        for task in data["tasks"]:
            header, *rows = accuracy_table(data, task)
            header = [f"{name}: {header[0]}", *header[1:]]
            lines = [text_table(rows, header, align_right=True)]
            if text := baselines_text(data, task):
                lines.append(f"no network: {text}")
            parts.append("\n".join(lines))
        if table := cost_table(data):
            parts.append(text_table(table[1:], table[0], align_right=True))
        parts.append("\n".join([*data["verdict"], *(f"- {note}" for note in data["notes"])]))
    return "\n\n".join(parts)


def markdown(study: dict[str, Any]) -> str:
    """Return all tables as Markdown. The best of the frozen and of the fine-tuned encoders of a column is bold."""
    parts = []
    for name, data in study["datasets"].items():
        parts.append(f"## {name}")
        for task in data["tasks"]:
            header, *rows = accuracy_table(data, task)
            columns = [*zip(*(row[1:] for row in rows), strict=True)]
            best = [max(column, key=_mean) for column in columns]
            marked = [
                [row[0], *(f"**{c}**" if c == b and c != "-" else c for c, b in zip(row[1:], best, strict=True))]
                for row in rows
            ]
            parts.append(_markdown_table([header, *marked]))
            if text := baselines_text(data, task):
                parts.append(f"No network: {text}.")
        if table := cost_table(data):
            parts.append(_markdown_table(table))
        parts.append("\n".join(f"- {line}" for line in [*data["verdict"], *data["notes"]]))
    return "\n\n".join(parts) + "\n"


def _mean(text: str) -> float:
    return -1.0 if text == "-" else float(text.partition(" ")[0])


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)
