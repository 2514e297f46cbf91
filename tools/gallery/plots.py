"""Drawings of the gallery from numbers: learning curves of a study, a table of a page."""

import re
from collections.abc import Callable
from pathlib import Path

from matplotlib.figure import Figure

from tubelet.config import ConfigError
from tubelet.report import study_figures, study_file
from tubelet.report.figures import COLORS


def learning_curves(dataset: str) -> Callable[[Path], Figure]:
    """Return what draws the accuracy of the objectives over the operations, on one data set of a study's folder."""

    def draw(folder: Path) -> Figure:
        drawn = study_figures.curves(study_file.read(folder).get("datasets", {}).get(dataset, {}))
        if "flops" not in drawn:
            raise ConfigError(f"{folder} has no study with learning curves of the data set {dataset}: make objectives")
        return drawn["flops"]

    return draw


def packed(page: Path) -> Figure:
    """Draw clips per second from packed shards and from the original files, the table of docs/cluster_data.md."""
    rows = table(page.read_text(encoding="utf-8"), "original, packed to")
    if not rows:
        raise ConfigError(f"{page} has no table with the column 'original, packed to'")
    figure = Figure(figsize=(5.6, 0.62 * len(rows) + 0.8), layout="constrained")
    axes = figure.add_subplot()
    names = [_two_lines(row["original, packed to"]) for row in rows]
    for offset, column, color, label in (
        (-0.19, "clips/s, original", COLORS[4], "original files"),
        (0.19, "clips/s, packed", COLORS[1], "packed shards"),
    ):
        values = [float(row[column]) for row in rows]
        bars = axes.barh([y + offset for y in range(len(rows))], values, height=0.36, color=color, label=label)
        axes.bar_label(bars, fmt=" {:g}", fontsize=7.5)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("clips/s", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def table(text: str, first: str) -> list[dict[str, str]]:
    """Return the rows of the Markdown table whose first column has the title `first`: title of a column -> text."""
    found = re.search(rf"^\| {re.escape(first)} \|.*\n(\|.*\n)+", text, re.MULTILINE)
    if found is None:
        return []
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[0].splitlines()]
    return [dict(zip(header, row, strict=True)) for row in rows]


def _two_lines(title: str) -> str:
    """Break '1280×720, 256 px, all frames, crop 224' in the middle."""
    parts = title.split(", ")
    middle = len(parts) // 2
    return ", ".join(parts[:middle]) + ",\n" + ", ".join(parts[middle:])
