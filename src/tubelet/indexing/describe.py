"""Describe one video file: a row of an index."""

import hashlib
import itertools
import os
from typing import Any

import numpy as np

from tubelet.data.decoders import first_line
from tubelet.indexing.options import ReadingOptions
from tubelet.indexing.perceptual import FRACTIONS, SIDE, perceptual_hash

BLOCK = 1 << 16
MAX_PACKETS = 600
"""Packets that are read to find the distance of key frames in a file without an index."""

Row = dict[str, Any]
"""Columns of an index (see `options.SCHEMA`) -> values; missing ones are null."""


def describe(path: str, options: ReadingOptions) -> Row:
    """Return the row of a file. One that cannot be read is described as far as possible, with the reason."""
    row: Row = {"readable": False}
    try:
        status = os.stat(path)
        row |= {"size": status.st_size, "mtime": status.st_mtime_ns}
        if options.content_hash is not None:
            row["content_hash"] = content_hash(path, status.st_size, whole=options.content_hash == "file")
        _describe_video(path, options, row)
    except Exception as error:  # FFmpeg raises many types of errors for damaged files
        if isinstance(error, OSError):  # such as of permissions: may pass without a change of the file
            row["mtime"] = None
        return row | {"reason": first_line(error).replace(f": '{path}'", "")}
    return row | {"readable": True}


def content_hash(path: str, size: int, whole: bool) -> str:
    """Return 32 hexadecimal digits of BLAKE2b of the size and of the file or of three blocks of it."""
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with open(path, "rb", buffering=0) as file:
        if whole:
            while block := file.read(1 << 20):
                digest.update(block)
        else:
            for start in (0, max(0, (size - BLOCK) // 2), max(0, size - BLOCK)):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _describe_video(path: str, options: ReadingOptions, row: Row) -> None:
    """Add what is known of the video to `row`."""
    import av

    av.logging.set_level(av.logging.PANIC)  # the exception has the message
    with av.open(path) as container:
        row["container"] = container.format.name.split(",")[0]
        if container.streams.audio:
            row["audio"] = container.streams.audio[0].codec_context.name
        stream = container.streams.best("video")
        if stream is None:
            raise ValueError("no video stream in this file")
        codec: Any = stream.codec_context
        codec.thread_count = 1  # the files are read in parallel
        row |= {"codec": codec.codec.canonical_name, "width": codec.width, "height": codec.height}
        _add_times(container, stream, options.count_frames, row)
        frames, row["rotation"] = _sample_frames(container, stream, row, options.perceptual_hash)
        if options.perceptual_hash:
            row["perceptual_hash"] = perceptual_hash(frames)


def _add_times(container, stream, count_frames: bool, row: Row) -> None:
    """Add number of frames, duration, rate and distance of key frames."""
    fps = float(stream.average_rate or stream.guessed_rate or 0)
    if stream.duration is not None:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = (container.duration or 0) / 1e6  # of all streams
    frames, source = stream.frames, "header"
    if not frames and duration > 0 and fps > 0:
        frames, source = round(duration * fps), "duration"
    key_times = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
    if count_frames or not (frames and duration > 0):
        times, key_times = _packet_times(container, stream, None)
        frames, source = len(times), "scan"
        if not duration > 0 and len(times) > 1:
            duration = float((max(times) - min(times)) * stream.time_base) * len(times) / (len(times) - 1)
        fps = fps or (frames / duration if duration > 0 else 0.0)
    elif len(key_times) < 2:
        _, key_times = _packet_times(container, stream, MAX_PACKETS)
    row |= {"frames": frames, "frames_from": source, "duration": duration, "fps": fps}
    if len(key_times) > 1:
        row["key_frame_seconds"] = float(np.median(np.diff(np.sort(key_times))) * stream.time_base)
    elif frames <= MAX_PACKETS or source == "scan":
        row["key_frame_seconds"] = duration  # a single one


def _packet_times(container, stream, most: int | None) -> tuple[list[int], list[int]]:
    """Return the time stamps of the first packets, and those of key frames."""
    packets = (packet for packet in container.demux(stream) if packet.size and packet.pts is not None)
    read = [(packet.pts, packet.is_keyframe) for packet in itertools.islice(packets, most)]
    return [time for time, _ in read], [time for time, is_key in read if is_key]


def _sample_frames(container, stream, row: Row, all_frames: bool) -> tuple[np.ndarray, int]:
    """Decode the frames of the hash, or only the first one: gray [n, 32, 32], and their rotation in degrees."""
    from av.video.reformatter import VideoReformatter

    start = (stream.start_time or 0) * stream.time_base
    reformatter, pictures, frame = VideoReformatter(), [], None
    for fraction in FRACTIONS if all_frames else (0.0,):
        time = float(start) + fraction * row["duration"]
        container.seek(int(time / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time is None or frame.time >= time - 1e-6:
                break
        if frame is None:
            raise ValueError("no frame can be decoded")
        small = reformatter.reformat(frame, SIDE, SIDE, format="gray", interpolation="AREA", threads=1).to_ndarray()
        pictures.append(np.rot90(small, k=frame.rotation // 90 % 4))
    assert frame is not None
    return np.stack(pictures), frame.rotation % 360
