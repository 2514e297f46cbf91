"""Which metrics of log.jsonl a report shows, and what to look for in them. Nothing is drawn here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Curves:
    """A figure of metrics over the steps of a run.

    An objective lists its own figures as `CURVES` in its module, e.g. `CURVES = (Curves(…),)`.

    Args:
        key: Name of the figure and of its PNG.
        title: Title of the figure.
        unit: Label of the vertical axis.
        names: Key in log.jsonl -> label of the curve.
        caption: What the figure shows, and what to look for.
        smooth: Show means over neighboring steps.
    """

    key: str
    title: str
    unit: str
    names: dict[str, str]
    caption: str
    smooth: bool = False


GENERAL = (
    Curves(
        "rank",
        "Effective rank",
        "dimensions",
        {"rank_uncentered": "uncentered", "rank_centered": "centered"},
        "Effective rank (RankMe) of the mean features of the monitored clips. Look for: an uncentered rank that rises. "
        "If it falls towards 1, the features of all clips have the same direction: collapse. The centered rank alone "
        "can then stay high, because it only measures the small differences that remain.",
    ),
    Curves(
        "residual_variance",
        "Residual variance",
        "fraction",
        {"residual_variance": "outside of two components"},
        "Fraction of the variance across the monitored clips outside of its first two principal components. Look for: "
        "a value that does not fall far. At a quarter of its highest value two directions have taken over, which is "
        "collapse unless the labels of supervised training ask for it.",
    ),
    Curves(
        "spread",
        "Feature spread",
        "relative to the norm of the features",
        {
            "spread_within": "within a clip",
            "spread_tokens": "within a clip, without what clips share",
            "spread_across": "across clips",
            "spread_time": "over time, without what clips share",
        },
        "Standard deviation of the features over the tokens of a clip, of the mean features over the clips, and of the "
        "mean features of time slots over a clip. What all clips have in common at a position, such as a position "
        "embedding, is subtracted where the legend says so. Look for: none near zero. A decreasing spread across clips "
        "means that different videos get the same features, one over time that the features ignore motion.",
    ),
    Curves(
        "knn",
        "k-nearest-neighbor accuracy",
        "%",
        {"knn": "5 nearest neighbors"},
        "Fraction of the monitored clips that have the same label as their nearest neighbors in feature space. Labels "
        "are used for this curve only, not for training. Look for: an increase over step 0, the random encoder.",
    ),
    Curves(
        "speed",
        "Training speed",
        "clips/s",
        {"clips_per_second": "clips/s"},
        "Clips per second of all processes together. Look for: a constant speed. Drops are due to other jobs on the "
        "machine or to videos that are slow to read.",
        smooth=True,
    ),
    Curves(
        "lr",
        "Learning rate",
        "",
        {"lr": "learning rate"},
        "Learning rate of each step. Look for: the warmup and decay that the configuration asks for.",
    ),
)
"""Figures of every training, drawn where the log has one of their metrics."""


def loss_curves(log: Iterable[dict[str, Any]]) -> Curves:
    """Return the figure of an objective without `CURVES`: `loss` and every metric `loss_*` of the log."""
    metrics = dict.fromkeys(name for line in log for name in line if name.startswith("loss_"))
    names = {"loss": "total", **{name: name.removeprefix("loss_").replace("_", " ") for name in metrics}}
    caption = "Loss and its terms. Look for: a loss that falls and then levels off."
    return Curves("loss", "Loss", "", names, caption, smooth=True)


def figures_of(curves: Sequence[Curves], log: Sequence[dict[str, Any]]) -> list[Curves]:
    """Return the objective's figures, followed by those of `GENERAL` of which the log has a metric."""
    logged = {name for line in log for name, value in line.items() if value is not None}
    keys = {each.key for each in curves}
    return [*curves, *(each for each in GENERAL if each.key not in keys and logged & each.names.keys())]
