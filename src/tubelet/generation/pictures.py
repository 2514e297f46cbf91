"""True and predicted frames side by side, as a filmstrip and as an animation."""

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw
from torch import Tensor

from tubelet.report import figures

MAX_COLUMNS = 10
"""Maximum number of frames in a row of a filmstrip."""
GAP = 4
"""Width of frame borders in pixels."""
HEADER = 16
"""Height of the titles of an animation in pixels."""
GREY, ORANGE = (150, 150, 150), (224, 102, 28)


def to_pixels(frames: Tensor) -> np.ndarray:
    """Convert frames [B, C, T, H, W] with one or three channels in [0, 1] to RGB, uint8 [B, T, H, W, 3]."""
    pixels = (frames.clamp(0, 1) * 255).round().byte().cpu().expand(-1, 3, -1, -1, -1)
    return rearrange(pixels, "B C T H W -> B T H W C").numpy()


def filmstrip(seen: np.ndarray, ahead: dict[str, np.ndarray]) -> Image.Image:
    """Draw the input frames of each clip in a row, and below it one row per title with future frames.

    Rows of more than `MAX_COLUMNS` frames are subsampled evenly, including the last frame.

    Args:
        seen: Input frames, uint8 [B, T, H, W, 3].
        ahead: Future frames for each title, such as the true and the predicted ones, uint8 [B, T', H, W, 3].
    """
    height = min(132, seen.shape[2] * max(1, 64 // seen.shape[2]))
    strips = []
    for clip in range(len(seen)):
        rows = {f"clip {clip + 1}, seen": seen[clip], **{title: frames[clip] for title, frames in ahead.items()}}
        rows = {title: frames[_evenly(len(frames))] for title, frames in rows.items()}
        strips.append(figures.filmstrip(rows, width=MAX_COLUMNS * 1000, max_height=height, gap=GAP))
    return figures.stack(strips, gap=18)


def animation(seen: np.ndarray, ahead: dict[str, np.ndarray], frames_per_second: float) -> bytes:
    """Return a GIF with one row per clip and one column per title.

    Input frames have a gray border, future frames an orange one. Arguments as for `filmstrip`.
    """
    scale = max(1, 128 // seen.shape[2])
    images = [_animation_frame(list(ahead), [seen[:, t]] * len(ahead), GREY, scale) for t in range(seen.shape[1])]
    for t in range(next(iter(ahead.values())).shape[1]):
        images.append(_animation_frame(list(ahead), [frames[:, t] for frames in ahead.values()], ORANGE, scale))
    stacked = np.stack(images)
    return figures.to_gif(stacked, frames_per_second, height=stacked.shape[1])


def _animation_frame(
    titles: list[str], columns: list[np.ndarray], color: tuple[int, int, int], scale: int
) -> np.ndarray:
    """Draw one frame of the animation from the video frames of each column [B, H, W, 3], magnified by `scale`."""
    table = np.stack(columns).repeat(scale, axis=2).repeat(scale, axis=3)
    framed = np.full((*table.shape[:2], table.shape[2] + 2 * GAP, table.shape[3] + 2 * GAP, 3), color, np.uint8)
    framed[:, :, GAP // 2 : -GAP // 2, GAP // 2 : -GAP // 2] = 255
    framed[:, :, GAP:-GAP, GAP:-GAP] = table
    sheet = Image.fromarray(rearrange(framed, "n B H W C -> (B H) (n W) C"))
    image = Image.new("RGB", (sheet.width, sheet.height + HEADER), "white")
    image.paste(sheet, (0, HEADER))
    for number, title in enumerate(titles):
        center = (number + 0.5) * sheet.width / len(titles)
        ImageDraw.Draw(image).text((center, HEADER / 2), title, fill="#444444", anchor="mm", font_size=12)
    return np.asarray(image)


def _evenly(number: int) -> np.ndarray:
    """Return at most `MAX_COLUMNS` evenly spaced indices below `number`, including the last."""
    step = -(-number // MAX_COLUMNS)
    return np.arange(number - 1, -1, -step)[::-1]
