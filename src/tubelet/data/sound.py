"""Read the sound of a span of a video file."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from tubelet.data.decoders.files import PathOrFile, first_line, name_of, readable
from tubelet.data.resampling import resample, span_needed
from tubelet.data.types import VideoError

PREROLL = Fraction(1, 4)
"""Seconds decoded before the span: the first frames after a seek depend on those before them (AAC, Opus, MP3)."""


class SoundError(VideoError):
    """A file without usable sound in the span that was asked for."""


@dataclass(frozen=True)
class Span:
    """A span of the sound to read.

    Attributes:
        start: Seconds after the first frame of the video is shown, rounded to a multiple of 1 / `sample_rate` on the
            clock of the file; may be negative.
        num_samples: Number of samples.
        sample_rate: Samples per second.
    """

    start: float
    num_samples: int
    sample_rate: int

    def first(self, video_start: Fraction) -> int:
        """Return the number of the first sample on the clock of the file."""
        return round((video_start + Fraction(self.start)) * self.sample_rate)

    def needed(self, video_start: Fraction, rate: int) -> tuple[int, int]:
        """Return the samples of a track with another rate, first and end, from which those of the span follow."""
        return span_needed(self.first(video_start), self.num_samples, rate, self.sample_rate)


@dataclass(frozen=True)
class SoundTrack:
    """Decoded sound of a file, all of it or what a span needs.

    Attributes:
        name: Name of the file, for messages.
        video_start: Time of the file in seconds at which the first frame of the video is shown.
        rate: Samples per second.
        runs: Of each part without gaps, in the order of time: its first sample and the one after its last, as numbers
            on the clock of the file, and what float32 [samples, channels] are sliced from, an array or an open file.
            What is between and around the parts is silence.
    """

    name: str
    video_start: Fraction
    rate: int
    runs: Sequence[tuple[int, int, Any]]

    def read(self, span: Span) -> np.ndarray:
        """Return the sound of the span, float32 [channels, num_samples]. Raises SoundError where it has none."""
        begin, end = span.needed(self.video_start, self.rate) if self.runs else (0, 0)
        samples = None
        for first, after, run in self.runs:
            low, high = max(begin, first), min(end, after)
            if low < high:
                part = run[low - first : high - first]
                if samples is None:
                    samples = np.zeros((part.shape[1], end - begin), np.float32)
                samples[:, low - begin : high - begin] = part.T
        if samples is None:
            end_second = span.start + span.num_samples / span.sample_rate
            raise SoundError(self.name, f"no sound from {span.start:g} to {end_second:g} seconds of its track")
        return resample(samples, span.first(self.video_start), span.num_samples, self.rate, span.sample_rate)


def read_sound(source: PathOrFile, span: Span, channels: int = 1) -> np.ndarray:
    """Read the sound that is played in a span of time.

    Time stamps of both tracks count, so that sound and frames are aligned as a player does it. What is before the
    beginning or after the end of the sound track, or in a gap of it, is silence. A span is the same as that part of the
    whole sound track after decoding and resampling.

    Args:
        source: Path, or file-like object, see `tubelet.data.decoders.open_video`.
        span: The span. Other sample rates are resampled.
        channels: 1, the mean of both sides, or 2; more are mixed to two by FFmpeg.

    Returns:
        float32 [channels, num_samples], from -1 to 1.

    Raises:
        SoundError: There is no sound track, it cannot be decoded, or it has nothing in the span.
    """
    return decode_sound(source, channels, span).read(span)


def decode_sound(source: PathOrFile, channels: int = 1, span: Span | None = None) -> SoundTrack:
    """Decode the sound track, or what a span needs of it; arguments and errors are those of `read_sound`."""
    import av

    name = name_of(source)
    try:
        with av.open(readable(source)) as container:
            stream = container.streams.best("audio")
            if stream is None:
                raise SoundError(name, "no sound track")
            return _decode(container, stream, name, channels, span)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise SoundError(name, f"cannot decode its sound: {first_line(error)}") from error


def _decode(container, stream, name: str, channels: int, span: Span | None) -> SoundTrack:
    video_start = _first_frame(container)
    start = None if span is None else Fraction(span.first(video_start), span.sample_rate)
    runs: list[tuple[int, list[np.ndarray]]] = []
    rate = position = 0
    end = math.inf
    for time, tolerance, frame_rate, part in _frames(container, stream, start, channels):
        if not rate:
            rate = frame_rate
            end = math.inf if span is None else span.needed(video_start, rate)[1]
        # Containers round time stamps; within the rounding, frames follow each other without gap.
        if not runs or abs(position - time * rate) > max(1, tolerance * rate):
            position = round(time * rate)
            runs.append((position, []))
        if position >= end:
            break
        runs[-1][1].append(part.T)
        position += part.shape[1]
    joined = [(first, np.concatenate(parts)) for first, parts in runs if parts]
    return SoundTrack(name, video_start, rate, [(first, first + len(run), run) for first, run in joined])


def _first_frame(container) -> Fraction:
    """Return the time at which the first frame of the video is shown; that of the sound where there is no video."""
    stream = container.streams.best("video") or container.streams.best("audio")
    return Fraction(0) if stream.start_time is None else stream.start_time * stream.time_base


def _frames(container, stream, start: Fraction | None, channels: int) -> Iterator[tuple[Fraction, float, int, Any]]:
    """Yield time and its tolerance in seconds, rate and samples [channels, n] of frames, from before `start` on."""
    import av

    stream.codec_context.thread_count = 1
    if start is not None and stream.start_time is not None and start - PREROLL > stream.start_time * stream.time_base:
        try:
            container.seek(math.floor((start - PREROLL) / stream.time_base), stream=stream)
        except av.FFmpegError:  # not all containers can; these are read from the beginning
            container.seek(0)
    convert = None
    for packet in container.demux(stream):
        for frame in packet.decode():
            if frame.pts is None:
                raise ValueError("a frame of the sound without time stamp")
            if convert is None:
                convert = av.AudioResampler("fltp", "stereo" if frame.layout.nb_channels > 2 else frame.layout)
            time, rate = frame.pts * frame.time_base, frame.sample_rate
            parts = [part.to_ndarray() for part in convert.resample(frame)]
            yield time, 1.5 * float(frame.time_base), rate, _mixed(np.concatenate(parts, axis=1), channels)


def _mixed(sound: np.ndarray, channels: int) -> np.ndarray:
    """Return mono or stereo sound [1 or 2, n] with so many channels."""
    if channels == len(sound):
        return sound
    return sound.mean(0, keepdims=True) if channels == 1 else sound.repeat(2, axis=0)
