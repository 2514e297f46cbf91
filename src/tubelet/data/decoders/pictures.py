"""Decoded frames of PyAV as upright RGB pictures."""

import numpy as np


class ToRgb:
    """PyAV frames to upright uint8 [H, W, 3]; bicubic chroma, like decord and torchcodec.

    One reformatter serves all frames, because it builds its tables on first use.

    Args:
        size: Width and height of the video. Where the size changes, frames of another one are resized to it, as
            decord, torchcodec and ffmpeg do.
    """

    def __init__(self, size: tuple[int, int]):
        from av.video.reformatter import VideoReformatter

        self._reformatter, self._size = VideoReformatter(), size

    def __call__(self, frame) -> np.ndarray:
        pixels = self._reformatter.reformat(
            frame, *self._size, format="rgb24", interpolation="BICUBIC", threads=1
        ).to_ndarray()
        matrix = display_matrix(frame)
        return pixels if matrix is None else upright(pixels, matrix)


def display_matrix(frame) -> np.ndarray | None:
    """Return the display matrix of a PyAV frame, int32 [3, 3]; None if it has none."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return None if matrix is None else np.frombuffer(matrix, np.int32).reshape(3, 3)


def upright(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Turn and mirror a picture [H, W, …] by a display matrix, as far as that is a matter of whole pixels.

    Column x and row y of the picture are displayed at column `a·x + c·y` and row `b·x + d·y`, where `a, b` and `c, d`
    begin the first two rows of the matrix.
    """
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
