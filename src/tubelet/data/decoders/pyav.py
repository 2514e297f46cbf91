"""Decoding with PyAV: the fastest of the decoders, because it skips frames that no requested frame depends on."""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import numpy as np

from tubelet.data.decoders.files import FileView, PathOrFile, first_line, name_of, opened, readable
from tubelet.data.decoders.frame_index import BEGINNING, INDICES, FrameIndex, Restarts, file_rate, scan
from tubelet.data.decoders.mp4 import read_movie
from tubelet.data.decoders.pictures import ToRgb
from tubelet.data.types import VideoError

MAX_DROPPED = 8
"""Frames by which the index of a file without presentation times may exceed the frames that it decodes to."""
MAX_EARLIER = 3
"""Key frames before the one wanted from which a file is read where seeking goes too far."""


class PyavVideo:
    """PyAV: an index of the time stamps of all frames; decoding starts at the nearest key frame.

    The index is that of the file (`mp4.read_movie`), or made of the time stamps of all packets where the file has no
    complete one. It is not trusted: a frame is used only if its time stamp is the one expected. Between the key frame
    and a requested frame, frames that no other frame refers to (most B frames) are not decoded. Where time stamps say
    nothing, frames are counted, if possible from a picture that nothing before it is needed for.
    """

    def __init__(self, source: PathOrFile):
        self._source = source
        self._container: Any = None
        self._file: BinaryIO | FileView | None = None
        index = INDICES.get(source)
        if index is None:
            index = self._open_and_index()
            INDICES.put(source, index)
        else:
            self._open(readable(source), index.options)
        self.index = index
        self.num_frames = len(index.times)

    def __del__(self):
        # PyAV's container and streams refer to each other, and would stay in memory until the next garbage collection.
        self._close()

    def _close(self) -> None:
        for opened_here in (self._container, self._file):
            if opened_here is not None:
                opened_here.close()

    @property
    def fps(self) -> float:
        return self.index.fps

    @property
    def times(self) -> np.ndarray:
        return self.index.seconds

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        for attempt in self._attempts(indices):
            try:
                return np.stack(list(attempt))
            except _TimesDiffer:
                pass
        raise AssertionError("counting does not depend on time stamps")

    def iter_frames_at(self, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the frames of `frames_at` one by one, in a single pass over the file."""
        given = 0
        for attempt in self._attempts(indices):
            try:
                for frame in itertools.islice(attempt, given, None):
                    yield frame
                    given += 1
                return
            except _TimesDiffer:
                pass

    def _attempts(self, indices: np.ndarray) -> Iterator[Iterator[np.ndarray]]:
        """Yield the ways to decode frames, the last of which does not need time stamps."""
        yield self._by_time(self.index, indices)
        if not self.index.scanned:
            self._open(readable(self._source))
            index = scan(self._container, self._stream)
            if len(index.times) == self.num_frames:
                yield self._by_time(index, indices)
        yield self._by_counting(self.index.restarts or BEGINNING, indices)

    def _open_and_index(self) -> FrameIndex:
        with opened(self._source) as header:
            movie = read_movie(header)
        if movie is not None:
            # Without the frames that an edit list hides, FFmpeg need not rewrite its own index.
            options = {} if any(track.trimmed for track in movie.tracks) else {"advanced_editlist": "0"}
            file = opened(self._source)
            self._open(FileView(file, movie.start, movie.content), options)
            self._file = file
            for track in movie.tracks:
                if track.number == self._stream.id and self._stream.time_base == Fraction(1, track.timescale):
                    base, rate = self._stream.time_base, file_rate(self._stream)
                    return FrameIndex(track.times, track.key_times, base, rate, options, scanned=False)
        self._open(readable(self._source))
        return scan(self._container, self._stream)

    def _open(self, file: str | FileView, options: dict[str, str] | None = None) -> None:
        """Open the container and its video stream, set to decode in one thread."""
        import av

        self._close()
        self._container, self._file = None, None
        self._container = av.open(file, options=options or {})
        self._stream = self._container.streams.best("video")
        if self._stream is None:
            raise ValueError("no video stream in this file")
        codec = self._stream.codec_context
        codec.thread_count = 1
        self._size = codec.width, codec.height

    def _by_time(self, index: FrameIndex, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Decode the frames with the time stamps of `indices`; _TimesDiffer if those of the index are others."""
        if index.restarts is not None:
            raise _TimesDiffer
        times, to_rgb = index.times[indices].tolist(), ToRgb(self._size)
        wanted, decoded = set(times), iter(())
        now: int | None = None
        for time in times:
            key = int(np.searchsorted(index.key_times, time, side="right")) - 1
            if now is None or key >= 0 and index.key_times[key] > now:
                decoded, now = self._decode(self._packets_from(index, key), wanted), None
            while now is None or now < time:
                frame = next(decoded, None)
                if frame is None or frame.pts is None or now is not None and frame.pts <= now:
                    raise _TimesDiffer
                now = frame.pts
            if now != time:
                raise _TimesDiffer
            yield to_rgb(frame)

    def _packets_from(self, index: FrameIndex, key: int) -> Iterator:
        """Yield the packets from key frame `key` on, from the beginning for -1; none if it is not found."""
        if key < 0:
            if self._seek(int(index.times[0]), stream=self._stream):
                yield from self._container.demux(self._stream)
            return
        time = int(index.key_times[key])
        for earlier in range(key, max(key - MAX_EARLIER, 0) - 1, -1):
            if not self._seek(int(index.key_times[earlier]), stream=self._stream):
                continue
            packets = self._container.demux(self._stream)
            for packet in packets:
                if packet.is_keyframe and packet.pts == time:
                    yield from itertools.chain([packet], packets)
                    return
                if packet.dts is not None and packet.dts > time:  # too far: not all containers have an index
                    break

    def _seek(self, offset: int, **options: Any) -> bool:
        """Whether FFmpeg finds the place; it does not in all files."""
        from av import FFmpegError

        try:
            self._container.seek(offset, **options)
        except FFmpegError:
            return False
        return True

    def _decode(self, packets: Iterator, wanted: set[int]) -> Iterator:
        """Yield frames; those neither requested nor referred to may be missing."""
        codec = self._stream.codec_context
        for packet in packets:
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
            yield from codec.decode(packet)

    def _by_counting(self, restarts: Restarts, indices: np.ndarray) -> Iterator[np.ndarray]:
        """Decode from the last restart and count."""
        self._open(readable(self._source))
        decoded, number, frame, to_rgb = self._counted(self._packets(), restarts, 0), -1, None, ToRgb(self._size)
        for index in indices.tolist():
            restart = int(np.searchsorted(restarts.numbers, index, side="right")) - 1
            if restarts.numbers[restart] > number + 1:
                packets, restart = self._packets_from_restart(restarts, restart)
                decoded, number = self._counted(packets, restarts, restart), int(restarts.numbers[restart]) - 1
            for new in itertools.islice(decoded, index - number):
                frame, number = new, number + 1
            if frame is None or number != index:
                raise ValueError(f"frame {index} of the {self.num_frames} in its index is missing")
            yield to_rgb(frame)

    def _counted(self, packets: Iterator, restarts: Restarts, restart: int) -> Iterator:
        """Yield the frames from a restart on. Frames that are missing do not change the numbers after the next restart.

        The last frame before that replaces a few of them, because the index of a file without presentation times may
        count frames that were dropped by the encoder. None replaces more.
        """

        def restart_before(packet) -> int:
            nonlocal restart
            restart += restarts.is_at(packet, restart + 1)
            return restart

        codec, bounds = self._stream.codec_context, [*restarts.numbers.tolist(), self.num_frames]
        for part, of_part in itertools.groupby(packets, restart_before):
            frame, number, end = None, bounds[part], bounds[part + 1]
            decoded = itertools.chain.from_iterable(map(codec.decode, itertools.chain(of_part, [None])))
            for frame in itertools.islice(decoded, end - number):
                yield frame
                number += 1
            codec.flush_buffers()
            yield from itertools.repeat(frame if end - number <= MAX_DROPPED else None, end - number)

    def _packets_from_restart(self, restarts: Restarts, last: int) -> tuple[Iterator, int]:
        """Seek to restart `last`, or to one before it. Return the packets from there on, and the restart."""
        for restart in range(last, max(last - MAX_EARLIER, 0), -1):
            if restarts.by_position:
                found = self._seek(int(restarts.positions[restart]), unsupported_byte_offset=True)
            else:
                found = self._seek(int(restarts.times[restart]), stream=self._stream)
            packets = self._packets() if found else iter(())
            packet = next(packets, None)
            if packet is not None and restarts.is_at(packet, restart):
                return itertools.chain([packet], packets), restart
        self._open(readable(self._source))
        return self._packets(), 0

    def _packets(self) -> Iterator:
        return (packet for packet in self._container.demux(self._stream) if packet.size)


class _TimesDiffer(Exception):
    """The decoded frames of a file have other time stamps than its index."""


def index_of(source: PathOrFile, num_frames: int, decoder: str) -> FrameIndex:
    """Return when the frames of a video that another library decodes are shown: rates and times are PyAV's everywhere.

    Raises:
        VideoError: The library counts other frames than PyAV, or PyAV cannot open the file.
    """
    try:
        index = PyavVideo(source).index
    except Exception as error:
        raise VideoError(name_of(source), f"no times of its frames: {first_line(error)}") from error
    if len(index.times) != num_frames:
        reason = f"{decoder} finds {num_frames} frames, pyav {len(index.times)}; set data.decoder to pyav"
        raise VideoError(name_of(source), reason)
    return index
