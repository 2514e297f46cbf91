"""When each frame of a file is shown, and where its key frames are."""

import collections
import functools
import os
from collections.abc import Hashable
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from tubelet.data.decoders.files import PathOrFile

MAX_CACHED_FRAMES = 1 << 22
"""Frames of all indices that a process keeps: 32 MB."""


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a file in presentation order.

    Attributes:
        times: int64 [N], time stamps in units of `time_base` seconds, ascending.
        key_times: int64 [K], those of the key frames, ascending; includes frames that are only decoded.
        time_base: Seconds per unit.
        rate: Frames per second according to the file; 0 where it says nothing.
        options: Options of FFmpeg's demuxer with which it gives these time stamps.
        scanned: Whether all packets of the file were read, not only its tables.
        reliable: Whether time stamps tell the order of the frames; not where they repeat or start again, as in
            concatenated transport streams. Then frames can only be counted, and a constant rate is assumed.
    """

    times: np.ndarray
    key_times: np.ndarray
    time_base: Fraction
    rate: float
    options: dict[str, str] = field(default_factory=dict)
    scanned: bool = True
    reliable: bool = True

    @property
    def fps(self) -> float:
        """Average frames per second."""
        return self._rate_and_seconds[0]

    @property
    def seconds(self) -> np.ndarray:
        """float64 [N], from the first frame; exact multiples of 1 / `fps` where the file has a constant rate."""
        return self._rate_and_seconds[1]

    @functools.cached_property
    def _rate_and_seconds(self) -> tuple[float, np.ndarray]:
        if not self.reliable:
            return self.rate, np.arange(len(self.times)) / (self.rate or 1.0)
        number, duration = len(self.times), float((self.times[-1] - self.times[0]) * self.time_base)
        stored = (self.times - self.times[0]) * float(self.time_base)
        average = (number - 1) / duration if duration > 0 else self.rate
        # Containers round time stamps, Matroska to milliseconds.
        tolerance = 1.5 * float(self.time_base)
        for rate in (self.rate, average):
            if rate > 0 and np.abs(np.arange(number) / rate - stored).max() <= tolerance:
                return rate, np.arange(number) / rate
        return average, stored


def scan(container, stream) -> FrameIndex:
    """Read all packets of a container of PyAV.

    Packets that an edit list hides (`is_discard`) are decoded only: FFmpeg gives no frames for them.

    Raises:
        ValueError: There are no frames.
    """
    packets = [
        (packet.pts, packet.is_keyframe, packet.is_discard, packet.pts if packet.dts is None else packet.dts)
        for packet in container.demux(stream)
        if packet.size and packet.pts is not None
    ]
    times, is_key, hidden, decoding_times = np.array(packets, dtype=np.int64).reshape(-1, 4).T
    if hidden.all():
        raise ValueError("no frames in this file")
    shown = np.sort(times[hidden == 0])
    in_order = (np.diff(shown) > 0).all() and (np.diff(decoding_times) >= 0).all()
    return FrameIndex(
        times=shown,
        key_times=np.sort(times[is_key == 1]),
        time_base=stream.time_base,
        rate=float(stream.average_rate or 0),
        # Those of AVI are FFmpeg's guess.
        reliable=bool(in_order) and container.format.name != "avi",
    )


class IndexCache:
    """The indices of the files used last, each as long as its file is not changed; one for each process."""

    def __init__(self, max_frames: int = MAX_CACHED_FRAMES):
        self._max_frames = max_frames
        self.clear()

    def clear(self) -> None:
        self._frames = 0
        self._indices: collections.OrderedDict[Hashable, FrameIndex] = collections.OrderedDict()

    def get(self, source: PathOrFile) -> FrameIndex | None:
        """Return the index of a path, if it is known."""
        key = _identity(source)
        if key in self._indices:
            self._indices.move_to_end(key)
        return self._indices.get(key)

    def put(self, source: PathOrFile, index: FrameIndex) -> None:
        """Keep the index of a path; forget those that were not used for the longest time."""
        key = _identity(source)
        if key is None or key in self._indices:
            return
        self._indices[key] = index
        self._frames += len(index.times)
        while self._frames > self._max_frames:
            self._frames -= len(self._indices.popitem(last=False)[1].times)


def _identity(source: PathOrFile) -> Hashable:
    """Path, size and modification time; None for file-like objects."""
    if not isinstance(source, str):
        return None
    status = os.stat(source)
    return source, status.st_size, status.st_mtime_ns


INDICES = IndexCache()
