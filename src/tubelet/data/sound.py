"""Read the sound of a span of a video file."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from tubelet.data.decoders.files import PathOrFile, first_line, name_of, readable
from tubelet.data.resampling import resample, span_needed
from tubelet.data.types import VideoError

PREROLL = 0.25
"""Seconds decoded before the span: the first frames after a seek depend on those before them (AAC, Opus, MP3)."""


class SoundError(VideoError):
    """A file without usable sound in the span that was asked for."""


def read_sound(source: PathOrFile, start: float, num_samples: int, sample_rate: int, channels: int = 1) -> np.ndarray:
    """Read the sound that is played from `start` seconds after the first frame of the video is shown.

    Time stamps of both tracks count, so that sound and frames are aligned as a player does it. What is before the
    beginning or after the end of the sound track, or in a gap of it, is silence. A span is the same as that part of the
    whole sound track after decoding and resampling.

    Args:
        source: Path, or file-like object, see `tubelet.data.decoders.open_video`.
        start: Seconds, rounded to a multiple of 1 / `sample_rate` on the clock of the file; may be negative.
        num_samples: Samples to return.
        sample_rate: Their number per second; other rates are resampled.
        channels: 1, the mean of both sides, or 2; more are mixed to two by FFmpeg.

    Returns:
        float32 [channels, num_samples], from -1 to 1.

    Raises:
        SoundError: There is no sound track, it cannot be decoded, or it has nothing in the span.
    """
    import av

    try:
        with av.open(readable(source)) as container:
            sound = _read(container, start, num_samples, sample_rate, channels)
    except (av.FFmpegError, ValueError, OSError) as error:
        raise SoundError(name_of(source), f"cannot decode its sound: {first_line(error)}") from error
    if sound is None:
        raise SoundError(name_of(source), "no sound track")
    if not sound.shape[1]:
        raise SoundError(
            name_of(source), f"no sound from {start:g} to {start + num_samples / sample_rate:g} seconds of its track"
        )
    return sound


def _read(container, start: float, num_samples: int, sample_rate: int, channels: int) -> np.ndarray | None:
    """Return the samples; no samples where the track has none in the span, None where there is no track."""
    stream = container.streams.best("audio")
    if stream is None:
        return None
    first = round((_first_frame(container) + Fraction(start)) * sample_rate)
    frames = _frames(container, stream, Fraction(first, sample_rate), channels)
    begin = end = position = 0
    samples = np.zeros((channels, 0), np.float32)
    rate, found = 0, False
    for time, tolerance, frame_rate, part in frames:
        if not rate:
            rate = frame_rate
            begin, end = span_needed(first, num_samples, rate, sample_rate)
            samples = np.zeros((channels, end - begin), np.float32)
            position = round(time * rate)
        # Containers round time stamps; within the rounding, frames follow each other without gap.
        if abs(position - time * rate) > max(1, tolerance * rate):
            position = round(time * rate)
        if position >= end:
            break
        low, high = max(begin, position), min(end, position + part.shape[1])
        if low < high:
            samples[:, low - begin : high - begin] = part[:, low - position : high - position]
            found = True
        position += part.shape[1]
    return resample(samples, first, num_samples, rate, sample_rate) if found else np.zeros((channels, 0), np.float32)


def _first_frame(container) -> Fraction:
    """Return the time at which the first frame of the video is shown; that of the sound where there is no video."""
    stream = container.streams.best("video") or container.streams.best("audio")
    return Fraction(0) if stream.start_time is None else stream.start_time * stream.time_base


def _frames(container, stream, start: Fraction, channels: int) -> Iterator[tuple[Fraction, float, int, Any]]:
    """Yield time and its tolerance in seconds, rate and samples [channels, n] of frames, from before `start` on."""
    import av

    stream.codec_context.thread_count = 1
    seek = start - Fraction(PREROLL)
    if stream.start_time is not None and seek > stream.start_time * stream.time_base:
        try:
            container.seek(math.floor(seek / stream.time_base), stream=stream)
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
