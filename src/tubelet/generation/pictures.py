"""Truth and prediction side by side, as a filmstrip and as an animation."""

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from tubelet.report import figures

COLUMNS = 10
"""Most frames of a filmstrip's row."""
GAP = 4
HEADER = 16
GREY, ORANGE = (150, 150, 150), (224, 102, 28)


def to_pixels(frames: Tensor) -> np.ndarray:
    """[B, C, T, H, W] with one or three channels from 0 to 1 -> uint8 [B, T, H, W, 3]."""
    pixels = (frames.clamp(0, 1) * 255).round().byte().cpu().expand(-1, 3, -1, -1, -1)
    return rearrange(pixels, "B C T H W -> B T H W C").numpy()


def filmstrip(seen: np.ndarray, ahead: dict[str, np.ndarray]) -> Image.Image:
    """For each clip a row with the frames seen, and below it a row of each title's frames ahead, [B, T, H, W, 3].

    Where there are more than `COLUMNS` frames, these are shown evenly, the last one among them.
    """
    height = min(132, seen.shape[2] * max(1, 64 // seen.shape[2]))
    strips = []
    for clip in range(len(seen)):
        rows = {f"clip {clip + 1}, seen": seen[clip], **{title: frames[clip] for title, frames in ahead.items()}}
        rows = {title: frames[_evenly(len(frames))] for title, frames in rows.items()}
        strips.append(figures.filmstrip(rows, width=COLUMNS * 1000, highest=height, gap=GAP))
    return figures.stack(strips, gap=18)


def animation(seen: np.ndarray, ahead: dict[str, np.ndarray], frames_per_second: float) -> bytes:
    """A GIF: clips one below the other, a column for each title. Frames seen are framed grey, frames ahead orange."""
    times = max(1, 128 // seen.shape[2])
    pictures = [_sheet(list(ahead), [seen[:, t]] * len(ahead), GREY, times) for t in range(seen.shape[1])]
    for t in range(next(iter(ahead.values())).shape[1]):
        pictures.append(_sheet(list(ahead), [frames[:, t] for frames in ahead.values()], ORANGE, times))
    sheets = np.stack(pictures)
    return figures.to_gif(sheets, frames_per_second, height=sheets.shape[1])


def _sheet(titles: list[str], columns: list[np.ndarray], colour: tuple[int, int, int], times: int) -> np.ndarray:
    """One picture of the animation from each column's frames [B, H, W, 3], enlarged `times`."""
    table = np.stack(columns).repeat(times, axis=2).repeat(times, axis=3)
    framed = np.full((*table.shape[:2], table.shape[2] + 2 * GAP, table.shape[3] + 2 * GAP, 3), colour, np.uint8)
    framed[:, :, GAP // 2 : -GAP // 2, GAP // 2 : -GAP // 2] = 255
    framed[:, :, GAP:-GAP, GAP:-GAP] = table
    sheet = Image.fromarray(rearrange(framed, "n B H W C -> (B H) (n W) C"))
    whole = Image.new("RGB", (sheet.width, sheet.height + HEADER), "white")
    whole.paste(sheet, (0, HEADER))
    for number, title in enumerate(titles):
        middle = (number + 0.5) * sheet.width / len(titles)
        ImageDraw.Draw(whole).text((middle, HEADER / 2), title, fill="#444444", anchor="mm", font_size=12)
    return np.asarray(whole)


def _evenly(number: int) -> np.ndarray:
    step = -(-number // COLUMNS)
    return np.arange(number - 1, -1, -step)[::-1]
