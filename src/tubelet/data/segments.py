"""Parts of videos: `video.mp4#t=10,20.5` is what is presented from 10 to 20.5 seconds (W3C Media Fragments)."""

import re

import numpy as np

from tubelet.data.types import VideoError

_SEGMENT = re.compile(r"(?P<file>.*)#t=(?P<start>\d+(?:\.\d+)?),(?P<end>\d+(?:\.\d+)?)", re.DOTALL)


def fragment(start: float, end: float) -> str:
    """Return what is appended to a path for a part of its video. Raises ValueError where the part is empty."""
    if not 0 <= start < end < float("inf"):
        raise ValueError(f"start {start:g} and end {end:g}: expected seconds with 0 <= start < end")
    return f"#t={_seconds(start)},{_seconds(end)}"


def split_segment(path: str) -> tuple[str, tuple[float, float] | None]:
    """Return the path of the file, and start and end of the part in seconds; None for the whole video."""
    match = _SEGMENT.fullmatch(path)
    return (match["file"], (float(match["start"]), float(match["end"]))) if match else (path, None)


def part_of(video, segment: tuple[float, float], path: str) -> "VideoPart":
    """Return the frames of a `Video` that are presented in a segment.

    Args:
        video: An open video.
        segment: Start and end in seconds; an end after that of the file is that of the file.
        path: Name of the part in error messages.

    Raises:
        VideoError: There is no frame in the segment.
    """
    start, stop = np.searchsorted(video.times, segment).tolist()
    if start == stop:
        raise VideoError(path, f"no frame is in this segment; the file has {video.num_frames / video.fps:.1f} seconds")
    return VideoPart(video, start, stop)


class VideoPart:
    """Frames `start` to `stop` - 1 of a video, as a `Video`."""

    def __init__(self, video, start: int, stop: int):
        self._video, self._start = video, start
        self.num_frames, self.fps = stop - start, video.fps

    @property
    def start(self) -> float:
        """Seconds from the first frame of the file to that of the part."""
        return getattr(self._video, "start", 0.0) + float(self._video.times[self._start])

    @property
    def times(self) -> np.ndarray:
        times = self._video.times[self._start : self._start + self.num_frames]
        return times - times[0]

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        return self._video.frames_at(indices + self._start)


def _seconds(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")
