"""Figures of a report: curves over training, clips with their masks, principal components of features."""

import io
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from tubelet.report.curves import Curves

CONTEXT, TARGET, DROPPED = 0, 1, 2
TARGET_COLOR = np.array([255, 122, 26])
TARGET_OPACITY = 0.72
DROPPED_BRIGHTNESS = 0.25

COLORS = ("#1f6fb4", "#e0661c", "#3a9a5b", "#8c5bb0", "#7a7a7a", "#b8860b", "#c2407d", "#2aa5a0")
EVENT_COLOR = "#b00020"
LABEL_COLOR = "#808080"
"""Of the titles of filmstrips: gray, as the background is transparent and the page light or dark."""
MAX_POINTS = 600
"""Maximum number of points of a curve; more are not visible and make the page larger."""
MAX_SMOOTH_POINTS = 200


def series(log: Iterable[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the finite values of a metric, for the lines of the log that have it."""
    pairs = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    points = np.array(pairs, dtype=float).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    return points[:, 0], points[:, 1]


def subsample(steps: np.ndarray, values: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most `max_points` points, each a mean over neighboring steps."""
    if len(steps) <= max_points:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), max_points)
    return np.array([steps[p].mean() for p in parts]), np.array([values[p].mean() for p in parts])


def draw_curves(log: Sequence[dict[str, Any]], curves: Curves) -> Figure | None:
    """Draw the curves that the log has, with vertical lines at its events; None where it has none of the curves."""
    figure = draw_lines(curves, {title: series(log, name) for name, title in curves.names.items()})
    if figure is None:
        return None
    axes = figure.axes[0]
    for line in log:
        if "events" in line:
            axes.axvline(line["step"], color=EVENT_COLOR, linewidth=1, linestyle="--")
            axes.text(
                line["step"], 0.98, " " + ", ".join(line["events"]), color=EVENT_COLOR, fontsize=7, rotation=90,
                ha="right", va="top", transform=axes.get_xaxis_transform(),
            )  # fmt: skip
    return figure


def draw_lines(curves: Curves, lines: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure | None:
    """Draw lines as title, unit and smoothing of `curves` say; None where all are empty.

    Args:
        curves: The figure.
        lines: Label -> steps and values.
    """
    colors = dict(zip(lines, itertools.cycle(COLORS), strict=False))
    lines = {title: line for title, line in lines.items() if len(line[0])}
    if not lines:
        return None
    figure = Figure(figsize=(5.4, 3.1), layout="constrained")
    axes = figure.add_subplot()
    for title, (steps, values) in lines.items():
        x, y = subsample(steps, values, MAX_SMOOTH_POINTS if curves.smooth else MAX_POINTS)
        marker = "o" if len(x) < 30 else None
        axes.plot(x, y, color=colors[title], label=title, linewidth=1.6, marker=marker, markersize=3)
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
    """Return the role of each token of a clip.

    Args:
        context: Indices of the context tokens, in time-major order.
        target: Indices of the target tokens.
        grid: Token grid (t, h, w).

    Returns:
        CONTEXT, TARGET or DROPPED (neither), int [t, h, w].
    """
    roles = np.full(int(np.prod(grid)), DROPPED)
    roles[context] = CONTEXT
    roles[target] = TARGET
    return roles.reshape(grid)


def shade(frames: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Shade frames by the roles of their tokens: target tokens in orange, dropped tokens dark, context unchanged.

    Args:
        frames: One frame of each time slot, uint8 [t, H, W, 3].
        roles: Roles of the tokens [t, h, w], see `token_roles`.
    """
    size = frames.shape[1] // roles.shape[1], frames.shape[2] // roles.shape[2]
    pixels = roles.repeat(size[0], axis=1).repeat(size[1], axis=2)[..., None]
    orange = (1 - TARGET_OPACITY) * frames + TARGET_OPACITY * TARGET_COLOR
    shaded = np.where(pixels == TARGET, orange, np.where(pixels == DROPPED, DROPPED_BRIGHTNESS * frames, frames))
    return shaded.round().astype(np.uint8)


def principal_components(tokens: np.ndarray, count: int = 3) -> np.ndarray:
    """Project tokens [..., D] onto their first principal components over all leading dimensions: [..., count].

    The sign of each component is chosen such that its largest loading is positive.
    """
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(flat, full_matrices=False)
    directions = directions[:count]
    largest = np.abs(directions).argmax(1)
    directions = directions * np.sign(directions[np.arange(len(directions)), largest])[:, None]
    return (flat @ directions.T).reshape(*tokens.shape[:-1], -1)


def as_colors(components: np.ndarray) -> np.ndarray:
    """Map the 2nd to 98th percentile of each of three components [..., 3] to 0..255, uint8."""
    flat = components.reshape(-1, components.shape[-1])
    low, high = np.percentile(flat, [2, 98], axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return (255 * scaled.clip(0, 1)).round().astype(np.uint8)


def overlay(colors: np.ndarray, frames: np.ndarray, weight: float = 0.8) -> np.ndarray:
    """Blend frames uint8 [t, H, W, 3] with colors uint8 [t, h, w, 3] that are interpolated to their size."""
    height, width = frames.shape[1:3]
    enlarged = np.stack(
        [np.asarray(Image.fromarray(slot).resize((width, height), Image.Resampling.BICUBIC)) for slot in colors]
    )
    return (weight * enlarged + (1 - weight) * frames).round().astype(np.uint8)


def filmstrip(rows: dict[str, np.ndarray], width: int = 960, max_height: int = 132, gap: int = 4) -> Image.Image:
    """Draw rows of frames with their titles on the left, on a transparent background.

    Args:
        rows: Title -> frames, uint8 [t, H, W, 3].
        width: Maximum width in pixels.
        max_height: Maximum height of a row in pixels.
        gap: Pixels between frames.
    """
    label = 100
    t, H, W = next(iter(rows.values())).shape[:3]
    height = min(max_height, int(((width - label) / t - gap) * H / W))
    strips = []
    for title, frames in rows.items():
        scale = height / frames.shape[1]
        size = (round(frames.shape[2] * scale), height)
        sampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
        pictures = [Image.fromarray(frame).resize(size, sampling) for frame in frames]
        strip = Image.new("RGBA", (label + len(pictures) * (size[0] + gap) - gap, height))
        ImageDraw.Draw(strip).text(
            (0, height / 2), title.replace(", ", "\n"), fill=LABEL_COLOR, anchor="lm", font_size=15
        )
        for i, picture in enumerate(pictures):
            strip.paste(picture, (label + i * (size[0] + gap), 0))
        strips.append(strip)
    return stack(strips, gap)


def stack(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Place images below each other on a transparent background."""
    canvas = Image.new("RGBA", (max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap))
    top = 0
    for picture in pictures:
        canvas.paste(picture, (0, top))
        top += picture.height + gap
    return canvas


def to_png(picture: Figure | Image.Image) -> bytes:
    """Encode a figure or an image as PNG."""
    buffer = io.BytesIO()
    if isinstance(picture, Figure):
        picture.savefig(buffer, format="png", dpi=130)
    else:
        picture.save(buffer, format="png", optimize=True)
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """Encode a figure as SVG. Equal figures give equal texts, and the letters are shapes that need no font."""
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "tubelet"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r" +$", "", buffer.getvalue(), flags=re.MULTILINE)


def to_gif(frames: np.ndarray, frames_per_second: float, height: int = 128) -> bytes:
    """Encode frames uint8 [T, H, W, 3] as an animation that repeats, scaled to `height` pixels."""
    size = (round(frames.shape[2] * height / frames.shape[1]), height)
    pictures = [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in frames]
    buffer = io.BytesIO()
    duration = round(1000 / frames_per_second)
    pictures[0].save(buffer, format="gif", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return buffer.getvalue()
