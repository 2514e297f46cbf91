"""When each frame of a file is shown, and from where it can be decoded."""

import collections
import functools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from tubelet.data.decoders.files import PathOrFile, identity

MAX_CACHED_FRAMES = 1 << 22
"""Frames of all indices that a process keeps: 32 MB."""


@dataclass(frozen=True)
class Restarts:
    """Packets at which decoding can start such that frames can be counted from there; the first is that of the file.

    Attributes:
        numbers: int64 [R], the frame that each gives first, ascending from 0; the packets before give all before it.
        times, positions: int64 [R], their decoding times, and their bytes in the file (-1: unknown).
        by_position: Whether to seek to bytes, because time stamps start again.
    """

    numbers: np.ndarray
    times: np.ndarray
    positions: np.ndarray
    by_position: bool

    def is_at(self, packet, restart: int) -> bool:
        """Whether a packet of PyAV is that of a restart; there is none after the last."""
        if restart == len(self.numbers):
            return False
        return (_decoding_time(packet), _position(packet)) == (self.times[restart], self.positions[restart])


BEGINNING = Restarts(np.array([0]), np.array([0]), np.array([-1]), by_position=False)
"""Decode all frames from the beginning."""


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
        restarts: Where time stamps do not tell the order of the frames, and they have to be counted: where to start.
            `times` then follow from the decoding times, and the decoded frames have others.
    """

    times: np.ndarray
    key_times: np.ndarray
    time_base: Fraction
    rate: float
    options: dict[str, str] = field(default_factory=dict)
    scanned: bool = True
    restarts: Restarts | None = None

    @property
    def fps(self) -> float:
        """Average frames per second; 1 for a single frame of a file that states no rate."""
        return self._rate_and_seconds[0]

    @property
    def seconds(self) -> np.ndarray:
        """float64 [N], from the first frame; exact multiples of 1 / `fps` where the file has a constant rate."""
        return self._rate_and_seconds[1]

    @functools.cached_property
    def _rate_and_seconds(self) -> tuple[float, np.ndarray]:
        number, duration = len(self.times), float((self.times[-1] - self.times[0]) * self.time_base)
        stored = (self.times - self.times[0]) * float(self.time_base)
        average = (number - 1) / duration if duration > 0 else self.rate or 1.0
        # Containers round time stamps, Matroska to milliseconds.
        tolerance = 1.5 * float(self.time_base)
        for rate in (self.rate, average):
            if rate > 0 and np.abs(np.arange(number) / rate - stored).max() <= tolerance:
                return rate, np.arange(number) / rate
        return average, stored


def file_rate(stream) -> float:
    """Frames per second of a stream of PyAV according to its file; of a single frame there may be a guess only."""
    return float(stream.average_rate or stream.guessed_rate or 0)


def scan(container, stream) -> FrameIndex:
    """Read all packets of a container of PyAV.

    Packets that an edit list hides (`is_discard`) are decoded only: FFmpeg gives no frames for them.

    Raises:
        ValueError: There are no frames.
    """
    codec = stream.codec_context.name
    packets = [
        (
            packet.pts,
            _decoding_time(packet),
            packet.dts is not None,
            packet.is_keyframe,
            packet.is_discard,
            _position(packet),
            packet.is_keyframe and _is_refresh(packet, codec),
        )
        for packet in container.demux(stream)
        if packet.size and packet.pts is not None
    ]
    times, decoding, is_given, is_key, is_hidden, position, is_refresh = np.array(packets, np.int64).reshape(-1, 7).T
    if is_hidden.all():
        raise ValueError("no frames in this file")
    shown, key_times = np.sort(times[is_hidden == 0]), np.sort(times[is_key == 1])
    starts_again = bool((np.diff(decoding[is_given == 1]) < 0).any())
    restarts = None
    # AVI has no presentation times. FFmpeg's parsers find them, but not those of these codecs.
    if starts_again or (np.diff(shown) <= 0).any() or container.format.name == "avi" and codec in REFRESH:
        numbers = np.cumsum(is_hidden == 0) - (is_hidden == 0)
        restart = np.union1d(0, np.flatnonzero(is_refresh == 1))
        restarts = Restarts(numbers[restart], decoding[restart], position[restart], by_position=starts_again)
        shown = _continued(decoding[is_hidden == 0])
    return FrameIndex(shown, key_times, stream.time_base, file_rate(stream), restarts=restarts)


def _decoding_time(packet) -> int:
    return packet.pts if packet.dts is None else packet.dts


def _position(packet) -> int:
    return -1 if packet.pos is None else packet.pos


REFRESH = {"h264": (0x1F, 0, (5,)), "hevc": (0x3F, 1, (19, 20))}
"""For codecs with reordered frames: mask, shift and values of the types of NAL units that need nothing before them."""


def _is_refresh(packet, codec: str) -> bool:
    """Whether all frames of the packets before are presented before all frames from this packet on (IDR pictures)."""
    if codec not in REFRESH:
        return False
    mask, shift, types = REFRESH[codec]
    return any(header >> shift & mask in types for header in _nal_headers(bytes(packet), packet.stream.codec_context))


def _nal_headers(content: bytes, codec_context) -> Iterator[int]:
    """Yield the first byte of each NAL unit of a packet: after a start code, or after its length."""
    configuration = codec_context.extradata or b""
    if configuration[:1] == b"\1" and len(configuration) > 22:  # avcC, hvcC
        length = (configuration[4 if codec_context.name == "h264" else 21] & 3) + 1
        position = 0
        while position + length < len(content):
            yield content[position + length]
            position += length + int.from_bytes(content[position : position + length], "big")
        return
    start = content.find(b"\0\0\1")
    while 0 <= start < len(content) - 3:
        yield content[start + 3]
        start = content.find(b"\0\0\1", start + 3)


def _continued(times: np.ndarray) -> np.ndarray:
    """Ascending times with the steps of `times`; where they start again, with the usual step."""
    steps = np.diff(times)
    usual = int(np.median(steps[steps > 0])) if (steps > 0).any() else 1
    return np.concatenate([[0], np.cumsum(np.where(steps > 0, steps, usual))])


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
        key = identity(source)
        if key in self._indices:
            self._indices.move_to_end(key)
        return self._indices.get(key)

    def put(self, source: PathOrFile, index: FrameIndex) -> None:
        """Keep the index of a path; forget those that were not used for the longest time."""
        key = identity(source)
        if key is None or key in self._indices:
            return
        self._indices[key] = index
        self._frames += len(index.times)
        while self._frames > self._max_frames:
            self._frames -= len(self._indices.popitem(last=False)[1].times)


INDICES = IndexCache()
