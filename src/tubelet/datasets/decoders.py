"""Three libraries that decode videos, behind one small interface.

`open_video(path, "decord" | "pyav" | "torchcodec")` gives a `Video`. Frame i is the i-th in order of presentation,
upright (a rotation noted in the file is applied), as 8-bit RGB. Each video decodes in one thread: the workers of a
loader share the cores already.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np

from tubelet.datasets import VideoError


class Video(Protocol):
    """An opened video. num_frames: as the file's index says; fps: frames a second, on average."""

    num_frames: int
    fps: float

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3], one frame for each of the ascending `indices` (repeats allowed)."""
        ...


class DecordVideo:
    def __init__(self, path: str):
        import decord

        self._reader = decord.VideoReader(path, num_threads=1)
        self.num_frames, self.fps = len(self._reader), float(self._reader.get_avg_fps())

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        return self._reader.get_batch(indices).asnumpy()


DECODERS: dict[str, Callable[[str], Video]] = {"decord": DecordVideo}


def open_video(path: str, decoder: str) -> Video:
    """Raises VideoError when the file cannot be opened or holds no frame."""
    try:
        video = DECODERS[decoder](path)
    except ImportError:
        raise
    except Exception as error:
        raise VideoError(path, f"{decoder} cannot open it: {short(error)}") from error
    if video.num_frames < 1 or not video.fps > 0:
        raise VideoError(path, f"{decoder} finds {video.num_frames} frames at {video.fps} frames a second")
    return video


def read_frames(video: Video, indices: np.ndarray, path: str) -> np.ndarray:
    """`video.frames_at(indices)`, uint8 [T, H, W, 3]; raises VideoError when decoding fails or gives something else."""
    unique, inverse = np.unique(indices, return_inverse=True)
    try:
        frames = video.frames_at(unique)
    except Exception as error:
        raise VideoError(path, f"cannot decode frames {unique[0]}..{unique[-1]}: {short(error)}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[0] != len(unique) or frames.shape[3] != 3:
        raise VideoError(path, f"decoding {len(unique)} frames gave {frames.dtype} {list(frames.shape)}")
    return frames if len(unique) == len(indices) else frames[inverse]


def short(error: Exception) -> str:
    """The first line of an error of a C++ library, whose later lines are a stack trace."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
