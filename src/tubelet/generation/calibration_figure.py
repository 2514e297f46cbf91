"""Rank histograms, and spread against error, of sampled forecasts."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from tubelet.generation.calibration import RANKED
from tubelet.report.figures import COLORS

TITLES = dict(zip(RANKED, ("tokens, projected", "mean of a clip, projected", "distance to the mean"), strict=True))


def draw(calibrations: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw one row of panels for each ensemble.

    Args:
        calibrations: Name -> result of `Calibration.summary`.
    """
    columns = len(RANKED) + 1
    figure = Figure(figsize=(3.0 * columns, 2.5 * len(calibrations) + 0.3), layout="constrained")
    panels = np.atleast_2d(figure.subplots(len(calibrations), columns))
    for row, (name, measured) in zip(panels, calibrations.items(), strict=True):
        for axes, ranked in zip(row, RANKED, strict=False):
            ranks = measured["ranks"][ranked]
            fractions = np.array(ranks["histogram"]) / sum(ranks["histogram"])
            axes.bar(np.arange(len(fractions)), fractions * len(fractions), width=1.0, color=COLORS[0])
            axes.axhline(1.0, color="#333333", linewidth=1)
            axes.set_title(f"{TITLES[ranked]}: deviation {ranks['deviation']:.2f}", loc="left", fontsize=8)
            axes.set_xlabel("rank of the truth", fontsize=8)
        row[0].set_ylabel(f"{name}\nfrequency, 1 if calibrated", fontsize=8)
        spread, error = np.array(measured["spread_error_bins"]).T
        limit = 1.05 * max(spread.max(), error.max())
        row[-1].plot([0, limit], [0, limit], color="#333333", linewidth=1)
        row[-1].plot(spread, error, color=COLORS[1], marker="o", markersize=3)
        row[-1].set_title(f"spread / error {measured['spread_over_error']:.2f}", loc="left", fontsize=8)
        row[-1].set_xlabel("spread of the draws", fontsize=8)
        row[-1].set_ylabel("error of their mean", fontsize=8)
        for axes in row:
            axes.tick_params(labelsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    return figure
