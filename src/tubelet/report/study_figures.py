"""Figures of a study: accuracies of the objectives and their references, learning curves, costs."""

import itertools
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from tubelet.report import aggregate, layout
from tubelet.report.aggregate import REFERENCE
from tubelet.report.figures import COLORS

ORANGE, BLUE = "#e0661c", "#9db8d2"
LINES = {"random_best": ("#111111", "--"), "supervised": ("#555555", ":"), "baseline": ("#555555", "-.")}
"""Color and style of the line of each reference."""


def bars(data: dict[str, Any]) -> Figure | None:
    """Draw the accuracies of a data set, a panel for each task and head: a bar for each objective, lines for the rest.

    None if no probe has a result.

    Error bars are one standard deviation. The dashed line is the best random encoder of the panel, the dotted one
    training from scratch, the dash-dotted one the best baseline.
    """
    tasks = data["tasks"]
    heads = list(dict.fromkeys(head for task in tasks for head in layout.heads_of(data, task)))
    if not heads:
        return None
    names = data["objectives"]
    height = (0.75 + 0.3 * len(names)) * len(tasks) + 0.5
    figure = Figure(figsize=(1.9 + 2.3 * len(heads), height), layout="constrained")
    panels = figure.subplots(len(tasks), len(heads), sharey=True, squeeze=False)
    for (y, task), (x, head) in itertools.product(enumerate(tasks), enumerate(heads)):
        axes = panels[y, x]
        if head not in layout.heads_of(data, task):
            axes.set_visible(False)
            continue
        _panel(axes, data, head, task)
        axes.set_title(f"{layout.task_title(task)}\n{aggregate.head_title(head)}", loc="left", fontsize=8.5)
    panels[0, 0].invert_yaxis()
    return figure


def _panel(axes: Axes, data: dict[str, Any], head: str, task: str) -> None:
    names = data["objectives"]
    cells = [layout.cell(data, head, name, task) or [np.nan, None] for name in names]
    means, stds = [mean for mean, _ in cells], [std or 0.0 for _, std in cells]
    reference = layout.cell(data, head, REFERENCE.get(head, "random_best"), task)
    colors = [BLUE if reference is not None and mean <= reference[0] else ORANGE for mean in means]
    axes.barh(names, means, xerr=stds, color=colors, error_kw={"elinewidth": 1.1, "ecolor": "#333333"})
    for y, (mean, std) in enumerate(zip(means, stds, strict=True)):
        if np.isfinite(mean):
            axes.text(min(mean + std + 1.5, 84), y, f"{mean:.1f}", va="center", fontsize=7)
    for row, found in _references(data, head, task).items():
        color, style = LINES[row]
        axes.axvline(found, color=color, linestyle=style, linewidth=1.2)
    axes.set_xlim(0, 100)
    _plain(axes)


def _references(data: dict[str, Any], head: str, task: str) -> dict[str, float]:
    """Return the mean accuracy of the references of a panel."""
    supervised = layout.cell(data, aggregate.FINE_TUNED, "supervised", task)
    random = layout.cell(data, head, "random_best", task)
    baselines = [mean for mean, _ in layout.baselines_of(data, task).values()]
    found = {
        "random_best": None if random is None else random[0],
        "supervised": None if supervised is None else supervised[0],
        "baseline": max(baselines, default=None),
    }
    return {row: mean for row, mean in found.items() if mean is not None}


AXES = {"clips": ("clips seen", 1.0), "flops": ("TFLOP", 1e12)}
"""Label and unit of what a learning curve is drawn over."""
TITLES = {"random_best": "best random encoder", "supervised": "from scratch", "baseline": "best baseline"}
"""Legend of the line of each reference."""


def curves(data: dict[str, Any]) -> dict[str, Figure]:
    """Draw the accuracy of all objectives over the clips seen and, where they were measured, over the operations.

    Returns:
        Key of `AXES` -> figure; empty without curves.
    """
    lines = data.get("curves", {}).get("lines", {})
    points = [point for line in lines.values() for point in line]
    return {key: _curves(data, key) for key in AXES if points and all(point[key] is not None for point in points)}


def _curves(data: dict[str, Any], key: str) -> Figure:
    found, (label, unit) = data["curves"], AXES[key]
    figure = Figure(figsize=(5.4, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for (name, points), color in zip(found["lines"].items(), itertools.cycle(COLORS), strict=False):
        x = [point[key] / unit for point in points]
        y = [point["accuracy"][0] for point in points]
        errors = [point["accuracy"][1] or 0.0 for point in points]
        axes.errorbar(x, y, errors, color=color, label=name, linewidth=1.6, marker="o", markersize=3.5, capsize=2)
    for row, mean in _references(data, found["head"], found["task"]).items():
        color, style = LINES[row]
        axes.axhline(mean, color=color, linestyle=style, linewidth=1.2, label=TITLES[row])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_locator(NullLocator())
    head, task = aggregate.head_title(found["head"]), layout.task_title(found["task"])
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel(f"top-1 in % on {task}, {head}", fontsize=9)
    axes.grid(True, color="#e6e6e6")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    _plain(axes)
    return figure


def costs(data: dict[str, Any]) -> Figure | None:
    """Draw clips per second and operations per clip of each objective."""
    measured = data.get("cost", {})
    if not measured:
        return None
    names = list(measured)
    figure = Figure(figsize=(8.0, 0.9 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key in zip(panels, ("clips_per_second", "gflop_per_clip"), strict=True):
        values = [cost[key] for cost in measured.values()]
        title, form = layout.COSTS[key]
        axes.barh(names, values, color=BLUE)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlim(0, 1.2 * max(values))
        _plain(axes)
        for y, value in enumerate(values):
            axes.text(value, y, f" {form.format(value)}", va="center", fontsize=7.5)
    panels[0].invert_yaxis()
    return figure


def _plain(axes: Axes) -> None:
    axes.tick_params(labelsize=8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
