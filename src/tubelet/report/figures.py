"""The pictures of a report: curves over training, clips with their masks, principal components of features."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

CONTEXT, TARGET, DROPPED = 0, 1, 2
TARGET_COLOUR = np.array([255, 122, 26])
TARGET_COVER = 0.72
DROPPED_LIGHT = 0.25

COLOURS = ("#1f6fb4", "#e0661c", "#3a9a5b", "#8c5bb0", "#7a7a7a", "#b8860b")
MAX_POINTS = 600  # of a curve: more cannot be seen, and each makes the page larger


@dataclass(frozen=True)
class Curves:
    """A figure of `names`, keys of log.jsonl, over the steps. `smooth`: show the mean over neighbouring steps."""

    key: str
    title: str
    unit: str
    names: dict[str, str]
    caption: str
    smooth: bool = False


CURVES = (
    Curves(
        "loss",
        "Loss",
        "",
        {
            "loss": "total",
            "loss_jepa": "prediction",
            "loss_std": "variance term",
            "loss_inv": "invariance term",
            "loss_cov": "covariance term",
            "loss_reg": "hinge on predictions",
        },
        "Look for: a prediction loss that falls and then levels off. It says nothing about collapse: features that "
        "have all become the same are easy to predict, so a loss near zero is bad news. With a moving target it may "
        "also rise while the features get better.",
        smooth=True,
    ),
    Curves(
        "rank",
        "Effective rank",
        "dimensions",
        {"rank_uncentered": "uncentred", "rank_centered": "centred"},
        "Effective number of dimensions of the target encoder's mean features (RankMe). Look for: an uncentred rank "
        "that rises. If it falls towards 1, all clips point the same way: collapse. The centred rank alone can stay "
        "high then, as it sees only the small noise that is left.",
    ),
    Curves(
        "spread",
        "Feature spread",
        "relative to the features' size",
        {"spread_within": "within a clip", "spread_across": "across clips"},
        "Standard deviation of the features, over the tokens of a clip and over the clips' means. Look for: neither "
        "near zero. A spread across clips that shrinks means that different videos get the same features.",
    ),
    Curves(
        "knn",
        "Nearest neighbours",
        "% right",
        {"knn": "5 nearest neighbours"},
        "How often a clip's nearest neighbours among the monitored clips share its label. Labels are only looked at "
        "here, training does not see them. Look for: a rise above the value at step 0, the random encoder.",
    ),
    Curves(
        "speed",
        "Speed",
        "clips a second",
        {"clips_per_second": "clips a second"},
        "Look for: a level line. Dips are other work on the machine, or videos that are slow to read.",
        smooth=True,
    ),
)


def series(log: Iterable[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `name` where the log has it."""
    found = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    points = np.array(found, dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    return points[:, 0], points[:, 1]


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `most` points: means over neighbouring steps."""
    if len(steps) <= most:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), most)
    return np.array([steps[p].mean() for p in parts]), np.array([values[p].mean() for p in parts])


def draw_curves(log: Sequence[dict[str, Any]], curves: Curves) -> Figure | None:
    """The figure, without the curves that the log lacks; None where it has none of them."""
    lines = {title: series(log, name) for name, title in curves.names.items()}
    lines = {title: line for title, line in lines.items() if len(line[0])}
    if not lines:
        return None
    figure = Figure(figsize=(5.4, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for colour, (title, (steps, values)) in zip(COLOURS, lines.items(), strict=False):
        x, y = thinned(steps, values, 200 if curves.smooth else MAX_POINTS)
        axes.plot(x, y, color=colour, label=title, linewidth=1.6, marker="o" if len(x) < 30 else None, markersize=3)
    axes.set_title(curves.title, loc="left", fontsize=11)
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel(curves.unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if max(y.max() for _, y in lines.values()) > 0:
        axes.set_ylim(bottom=min(0, *(y.min() for _, y in lines.values())))
    if len(lines) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def token_roles(context: np.ndarray, target: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """[t, h, w] of CONTEXT, TARGET or DROPPED from the indices of one clip's tokens, which are time-major."""
    roles = np.full(int(np.prod(grid)), DROPPED)
    roles[context] = CONTEXT
    roles[target] = TARGET
    return roles.reshape(grid)


def shade(frames: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Frames uint8 [t, H, W, 3], one for each time slot, shaded by what becomes of each token [t, h, w].

    Context stays as it is, target is covered in orange, tokens that are neither are darkened.
    """
    size = frames.shape[1] // roles.shape[1], frames.shape[2] // roles.shape[2]
    pixels = roles.repeat(size[0], axis=1).repeat(size[1], axis=2)[..., None]
    covered = (1 - TARGET_COVER) * frames + TARGET_COVER * TARGET_COLOUR
    shaded = np.where(pixels == TARGET, covered, np.where(pixels == DROPPED, DROPPED_LIGHT * frames, frames))
    return shaded.round().astype(np.uint8)


def principal_components(tokens: np.ndarray, count: int = 3) -> np.ndarray:
    """The first principal components [..., count] of tokens [..., D], over all leading axes together.

    The sign of each component, which is free, is chosen so that its largest loading is positive.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    directions = directions[:count]
    largest = np.abs(directions).argmax(1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    return (flat @ directions.T).reshape(*tokens.shape[:-1], -1)


def as_colours(components: np.ndarray) -> np.ndarray:
    """Each of three components [..., 3] from its 2nd to its 98th percentile onto 0..255, uint8."""
    flat = components.reshape(-1, components.shape[-1])
    low, high = np.percentile(flat, [2, 98], axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8)


def over_frames(colours: np.ndarray, frames: np.ndarray, weight: float = 0.8) -> np.ndarray:
    """Colours uint8 [t, h, w, 3] enlarged smoothly and laid over frames uint8 [t, H, W, 3]."""
    height, width = frames.shape[1:3]
    enlarged = np.stack(
        [np.asarray(Image.fromarray(slot).resize((width, height), Image.Resampling.BICUBIC)) for slot in colours]
    )
    return (weight * enlarged + (1 - weight) * frames).round().astype(np.uint8)


def filmstrip(rows: dict[str, np.ndarray], width: int = 960, highest: int = 132, gap: int = 4) -> Image.Image:
    """Rows of frames, title -> uint8 [t, H, W, 3], one below the other with their titles on the left.

    As wide as `width` at most, and a row as high as `highest` at most.
    """
    label = 100
    t, H, W = next(iter(rows.values())).shape[:3]
    height = min(highest, int(((width - label) / t - gap) * H / W))
    strips = []
    for title, frames in rows.items():
        scale = height / frames.shape[1]
        size = (round(frames.shape[2] * scale), height)
        sampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        pictures = [Image.fromarray(frame).resize(size, sampling) for frame in frames]
        strip = Image.new("RGB", (label + len(pictures) * (size[0] + gap), height), "white")
        ImageDraw.Draw(strip).text(
            (0, height / 2), title.replace(", ", "\n"), fill="#444444", anchor="lm", font_size=13
        )
        for i, picture in enumerate(pictures):
            strip.paste(picture, (label + i * (size[0] + gap), 0))
        strips.append(strip)
    return stack(strips, gap)


def stack(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures one below the other on white."""
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap), "white")
    top = 0
    for picture in pictures:
        whole.paste(picture, (0, top))
        top += picture.height + gap
    return whole


def bars(report: dict[str, Any], lines: Sequence[tuple[str, str, str]], tasks: Sequence[str]) -> Figure:
    """The table as bars, one panel a task: mean, standard deviation as a whisker."""
    titles = [title for _, _, title in lines]
    figure = Figure(figsize=(2.6 + 2.5 * len(tasks), 0.9 + 0.32 * len(lines)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(tasks), sharey=True))
    for axes, task in zip(panels, tasks, strict=True):
        cells = [report[head][row].get(task) or [np.nan, None] for head, row, _ in lines]
        means = [mean for mean, _ in cells]
        stds = [0.0 if std is None else std for _, std in cells]
        colours = ["#e0661c" if row == "pretrained" else "#9db8d2" for _, row, _ in lines]
        axes.barh(titles, means, xerr=stds, color=colours, error_kw={"elinewidth": 1.2, "ecolor": "#333333"})
        axes.set_title(task.replace("_", " "), loc="left", fontsize=10)
        axes.set_xlabel("top-1 in %", fontsize=8)
        axes.set_xlim(0, 100)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        for y, mean in enumerate(means):
            if np.isfinite(mean):
                axes.text(min(mean + stds[y] + 1.5, 86), y, f"{mean:.1f}", va="center", fontsize=7.5)
    panels[0].invert_yaxis()
    return figure


def to_png(picture: Figure | Image.Image) -> bytes:
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=130)
    else:
        picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def to_gif(frames: np.ndarray, frames_per_second: float, height: int = 128) -> bytes:
    """An endless animation of frames uint8 [T, H, W, 3]."""
    size = (round(frames.shape[2] * height / frames.shape[1]), height)
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    buffer = io.BytesIO()
    duration = round(1000 / frames_per_second)
    pictures[0].save(buffer, format="gif", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return buffer.getvalue()
