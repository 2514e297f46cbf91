"""Re-encode a video as one or several clips, and compare each with its source."""

import os
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from app.pack.options import EncodingOptions, VerificationOptions
from tubelet.data import storage
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.decoders.pictures import display_matrix, upright
from tubelet.data.storage import StorageConfig


class Clip(NamedTuple):
    """An encoded clip; `start` and `duration` are seconds from the first frame of its source."""

    content: bytes
    start: float
    duration: float
    frames: int
    width: int
    height: int
    psnr: float


class NotFaithful(Exception):
    """A clip that does not decode to what was encoded, or of too low a PSNR."""


class _TimedFrame(NamedTuple):
    frame: av.VideoFrame
    time: float
    end: float


def encode_video(
    path: str, options: EncodingOptions, verification: VerificationOptions, storage_options: StorageConfig
) -> Iterator[Clip]:
    """Yield the clips of a video in their order. Raises any error of PyAV, OSError, and NotFaithful."""

    def source() -> str | storage.PartOfFile:
        return storage.open_part(path, storage_options) if storage.is_remote(path) else storage.local_path(path)

    frames = _timed_frames(source())
    if options.fps is not None:
        frames = _at_rate(frames, options.fps)
    clip: _Encoder | None = None
    with tempfile.TemporaryDirectory() as folder:
        for timed in frames:
            if (
                clip is not None
                and options.clip_seconds
                and timed.time - clip.planned_start >= options.clip_seconds - 1e-6
            ):
                yield clip.finish()
                # More than one clip further where a frame was shown for longer than a clip.
                passed = max(1.0, (timed.time - clip.planned_start + 1e-6) // options.clip_seconds)
                planned_start = clip.planned_start + passed * options.clip_seconds
                clip = _Encoder(source, folder, timed, options, verification, planned_start)
            elif clip is None:
                clip = _Encoder(source, folder, timed, options, verification, 0.0)
            clip.add(timed)
        if clip is None:
            raise ValueError("no frame can be decoded")
        yield clip.finish()


def _timed_frames(source: str | storage.PartOfFile) -> Iterator[_TimedFrame]:
    """Yield the frames with their times from the first frame, in seconds. Damaged frames are an error."""
    container: Any
    with av.open(source) as container:
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("no video stream in this file")
        stream.codec_context.thread_count = 1
        interval = float(1 / (stream.average_rate or 25))
        first, previous, last = None, None, -interval
        for frame in container.decode(stream):
            time = last + interval if frame.time is None else frame.time - (first or 0.0)
            if first is None:
                first, time = frame.time or 0.0, 0.0
            if previous is not None:
                if time <= last:  # damaged time stamps; a file needs ascending ones
                    time = last + 1e-3
                yield _TimedFrame(previous, last, time)
            previous, last = frame, time
        if previous is not None:
            yield _TimedFrame(previous, last, last + interval)


def _at_rate(frames: Iterator[_TimedFrame], fps: float) -> Iterator[_TimedFrame]:
    """Yield the frame that is presented at each multiple of 1 / fps."""
    number = 0
    for timed in frames:
        while number / fps < timed.end - 1e-6:
            yield _TimedFrame(timed.frame, number / fps, (number + 1) / fps)
            number += 1


class _Encoder:
    """Writes a clip to a temporary file, whose index comes first so that remote readers need not look for it."""

    def __init__(
        self,
        source: Callable,
        folder: str,
        first: _TimedFrame,
        options: EncodingOptions,
        verification: VerificationOptions,
        planned_start: float,
    ):
        self.planned_start, self._first = planned_start, first.time
        self._source, self._options, self._verification = source, options, verification
        self._end, self._count, self._stride = first.end, 0, 1
        self._references: dict[int, np.ndarray] = {}
        self._path = os.path.join(folder, "clip.mp4")
        self._width, self._height = _size(first.frame, options.short_side)
        self._container = av.open(self._path, "w", options={"movflags": "+faststart", "fflags": "+bitexact"})
        rate = Fraction(options.fps).limit_denominator(1001) if options.fps else None
        crf = {} if options.crf is None else {"crf": str(options.crf)}
        self._stream: Any = self._container.add_stream(
            options.codec, rate=rate or 30, options={"g": str(options.gop), **crf, **options.options}
        )
        codec: Any = self._stream.codec_context
        codec.width, codec.height, codec.pix_fmt, codec.thread_count = self._width, self._height, "yuv420p", 1
        self._base = Fraction(1, 1) / rate if rate else Fraction(1, 90_000)
        codec.time_base = self._stream.time_base = self._base
        codec.colorspace, codec.color_range = first.frame.colorspace, 1  # limited range, as `reformat` makes it
        self._upright = _Upright(self._width, self._height)

    def add(self, timed: _TimedFrame) -> None:
        frame = self._upright(timed.frame)
        frame.time_base = self._base
        frame.pts = round((timed.time - self._first) / self._base)
        if self._count % self._stride == 0:
            self._remember(frame)
        self._container.mux(self._stream.encode(frame))
        self._count, self._end = self._count + 1, timed.end

    def finish(self) -> Clip:
        """Complete the file and return it. Raises NotFaithful."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        if self._options.audio:
            _add_audio(self._source, self._path, self._first, self._end)
        psnr = self._psnr()
        with open(self._path, "rb") as file:
            content = file.read()
        duration = self._end - self._first
        return Clip(content, self._first, duration, self._count, self._width, self._height, psnr)

    def _remember(self, frame: av.VideoFrame) -> None:
        """Keep every `stride`-th frame for the comparison; if they become too many, every second of them."""
        self._references[self._count] = frame.to_ndarray(format="rgb24")
        if len(self._references) > 2 * self._verification.frames:
            self._stride *= 2
            self._references = {n: kept for n, kept in self._references.items() if n % self._stride == 0}

    def _psnr(self) -> float:
        video = open_video(self._path, "pyav")
        if video.num_frames != self._count:
            raise NotFaithful(f"{video.num_frames} frames after encoding {self._count}")
        numbers = np.array(sorted(self._references))
        decoded = read_frames(video, numbers, self._path).astype(np.float32)
        error = float(np.mean((decoded - np.stack([self._references[n] for n in numbers.tolist()])) ** 2))
        psnr = 10 * np.log10(255**2 / max(error, 1e-2))
        if psnr < self._verification.min_psnr:
            raise NotFaithful(f"PSNR {psnr:.1f} dB, below verification.min_psnr {self._verification.min_psnr}")
        return float(psnr)


class _Upright:
    """Scales frames to 8-bit yuv420p, and turns and mirrors them as their display matrix says."""

    def __init__(self, width: int, height: int):
        self._width, self._height = width, height
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        width, height = (self._height, self._width) if _is_turned(frame) else (self._width, self._height)
        scaled = self._reformatter.reformat(
            frame, width, height, format="yuv420p", interpolation="AREA", dst_color_range="MPEG", threads=1
        )
        if (matrix := display_matrix(frame)) is not None:
            planes = [upright(plane, matrix) for plane in _planes(scaled)]
            turned = np.concatenate([np.ascontiguousarray(plane).reshape(-1) for plane in planes])
            scaled = av.VideoFrame.from_ndarray(turned.reshape(-1, self._width), format="yuv420p")
        scaled.pict_type = 0  # the encoder chooses the key frames
        return scaled


def _is_turned(frame: av.VideoFrame) -> bool:
    """Whether rows of the picture are displayed as columns."""
    matrix = display_matrix(frame)
    return matrix is not None and abs(int(matrix[0, 1])) > abs(int(matrix[0, 0]))


def _planes(frame: av.VideoFrame) -> list[np.ndarray]:
    """Return Y, U and V of a yuv420p frame with even sides."""
    flat, (height, width) = frame.to_ndarray().reshape(-1), (frame.height, frame.width)
    luma, quarter = height * width, height * width // 4
    half = (height // 2, width // 2)
    return [
        flat[:luma].reshape(height, width),
        flat[luma : luma + quarter].reshape(half),
        flat[luma + quarter :].reshape(half),
    ]


def _size(frame: av.VideoFrame, short_side: int | None) -> tuple[int, int]:
    """Return the even width and height of the upright clip."""
    width, height = (frame.height, frame.width) if _is_turned(frame) else (frame.width, frame.height)
    scale = min(1.0, (short_side or min(width, height)) / min(width, height))
    return max(2, 2 * round(width * scale / 2)), max(2, 2 * round(height * scale / 2))


def _add_audio(source: Callable, path: str, start: float, end: float) -> None:
    """Copy the packets of the first audio stream between two times into the clip, if the source has one."""
    with av.open(source()) as container, av.open(path) as video:
        audio = container.streams.best("audio")
        if audio is None:
            return
        origin = (container.streams.best("video").start_time or 0) * container.streams.best("video").time_base
        with av.open(path + ".mp4", "w", options={"movflags": "+faststart", "fflags": "+bitexact"}) as output:
            to_video = output.add_stream_from_template(video.streams.video[0])
            to_audio = output.add_stream_from_template(audio)
            for packet in video.demux(video.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = to_video
                    output.mux(packet)
            first = round((Fraction(start).limit_denominator(10**6) + origin) / audio.time_base)
            last = (Fraction(end).limit_denominator(10**6) + origin) / audio.time_base
            container.seek(first, stream=audio)
            for packet in container.demux(audio):
                if packet.pts is None or packet.pts < first:
                    continue
                if packet.pts >= last:
                    break
                packet.pts, packet.dts, packet.stream = packet.pts - first, packet.pts - first, to_audio
                output.mux(packet)
    os.replace(path + ".mp4", path)
