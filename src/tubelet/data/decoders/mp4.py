"""The sample tables of mp4 and mov files: the time stamps of all frames, without reading the frames.

A file has its tables in one box, `moov`; a box is a 32-bit size, a name of four letters, and the content. The tables
hold the decoding times (`stts`), the distance from there to the presentation times (`ctts`), the sizes (`stsz`) and the
key frames (`stss`) of a track, and the part of it that is presented (`elst`). See ISO/IEC 14496-12.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from tubelet.data.decoders.files import FileView

FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
MAX_BOXES = 1000
"""Boxes of a file outside of its `moov`; a file with more is read as if it had no tables."""
MAX_MOVIE_BYTES = 1 << 28


@dataclass(frozen=True)
class Track:
    """A video track. Times are in units of 1 / `timescale` seconds, as FFmpeg counts them.

    Attributes:
        number: Its ID in the file.
        timescale: Units per second.
        times: int64 [N], the presentation times of the frames that are presented, ascending.
        key_times: int64, those of the key frames, also of those that are only decoded, ascending.
        trimmed: Whether the edit list hides frames.
        mirrored: Whether the pictures have to be mirrored.
        has_leading: Whether there are frames that follow a key frame in the file, and are presented before it.
    """

    number: int
    timescale: int
    times: np.ndarray
    key_times: np.ndarray
    trimmed: bool
    mirrored: bool
    has_leading: bool


@dataclass(frozen=True)
class Movie:
    """The video tracks of a file, and its `moov` box, which starts at byte `start`."""

    tracks: list[Track]
    start: int
    content: bytes


class Unsupported(ValueError):
    """The tables are missing, incomplete or of a kind that is read by FFmpeg only."""


def read_movie(file: BinaryIO | FileView) -> Movie | None:
    """Read the tables of a file.

    Returns:
        None where the tables do not describe all frames, and the frames themselves have to be read: files of another
        format, fragmented or truncated ones, edit lists of several parts, and damaged tables.
    """
    try:
        start, size = _find_movie(file)
        file.seek(start)
        content = file.read(size)
        movie = _children(memoryview(content))[b"moov"][0]
        return Movie(_video_tracks(_children(movie)), start, content)
    except (ValueError, OverflowError, KeyError, IndexError, struct.error):  # the file may be damaged in any way
        return None


def _find_movie(file: BinaryIO | FileView) -> tuple[int, int]:
    """Return position and size of the only `moov` box. Raises Unsupported for fragmented and for truncated files."""
    end = file.seek(0, os.SEEK_END)
    found, position = None, 0
    for _ in range(MAX_BOXES):
        file.seek(position)
        header = file.read(16)
        size, name = struct.unpack_from(">I4s", header)
        if position == 0 and name not in FIRST_BOXES:
            raise Unsupported("not an mp4 file")
        if size == 1:
            (size,) = struct.unpack_from(">Q", header, 8)
        if size < 8 or position + size > end or name == b"moof":
            raise Unsupported("truncated or fragmented")
        if name == b"moov":
            if found is not None or size > MAX_MOVIE_BYTES:
                raise Unsupported("several or too large tables")
            found = position, size
        position += size
        if position == end and found is not None:
            return found
    raise Unsupported("no tables")


def _boxes(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Yield name and content of each box in `data`."""
    position = 0
    while position + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, position)
        header = 8
        if size == 1:
            (size,), header = struct.unpack_from(">Q", data, position + 8), 16
        if size < header or position + size > len(data):
            raise Unsupported(f"box {name!r} of {size} bytes")
        yield name, data[position + header : position + size]
        position += size


def _children(data: memoryview) -> dict[bytes, list[memoryview]]:
    children: dict[bytes, list[memoryview]] = {}
    for name, content in _boxes(data):
        children.setdefault(name, []).append(content)
    return children


def _video_tracks(movie: dict[bytes, list[memoryview]]) -> list[Track]:
    if b"mvex" in movie:
        raise Unsupported("fragmented")
    timescale = _number(movie[b"mvhd"][0], ">I", 12, 20)
    tracks = []
    for content in movie[b"trak"]:
        track = _children(content)
        media = _children(track[b"mdia"][0])
        if bytes(media[b"hdlr"][0][8:12]) == b"vide":
            tracks.append(_track(track, media, timescale))
    return tracks


def _track(track: dict[bytes, list[memoryview]], media: dict[bytes, list[memoryview]], movie_timescale: int) -> Track:
    timescale = _number(media[b"mdhd"][0], ">I", 12, 20)
    samples = _children(_children(media[b"minf"][0])[b"stbl"][0])
    sizes = _sizes(samples)
    if _number(samples[b"stsd"][0], ">I", 4, 4) != 1 or not timescale or not movie_timescale or len(sizes) == 0:
        raise Unsupported("several codecs, or no frames")
    times = _presentation_times(samples, len(sizes))
    is_key = np.ones(len(sizes), dtype=bool)
    # Key frames with leading frames may be listed apart: in `stps`, or in groups of samples.
    is_open = b"stps" in samples or b"sgpd" in samples
    if b"stss" in samples:
        is_key[:] = False
        for name in (b"stss", b"stps"):
            for content in samples.get(name, []):
                keys = _table(content, [("number", ">u4")])["number"].astype(np.int64) - 1
                is_key[keys[(keys >= 0) & (keys < len(sizes))]] = True
    start, end, shift = _edit(track, timescale, movie_timescale)
    is_frame, presented = sizes > 0, (times >= start) & (times < end)
    times_of_frames = np.sort(times[is_frame & presented], kind="stable")  # fast where it is nearly in order
    if len(times_of_frames) == 0 or not is_key.any() or (np.diff(times_of_frames) <= 0).any():
        raise Unsupported("no frames, no key frames, or several frames at one time")
    return Track(
        number=_number(track[b"tkhd"][0], ">I", 12, 20),
        timescale=timescale,
        times=times_of_frames + shift,
        key_times=np.sort(times[is_key & is_frame], kind="stable") + shift,
        trimmed=not presented.all(),
        mirrored=_is_mirrored(track[b"tkhd"][0]),
        has_leading=is_open or bool((_earliest_from(times[is_frame]) < times[is_frame])[is_key[is_frame]].any()),
    )


def _earliest_from(times: np.ndarray) -> np.ndarray:
    """The smallest of each time and all that follow it."""
    return np.minimum.accumulate(times[::-1])[::-1]


def _is_mirrored(header: memoryview) -> bool:
    """Whether the determinant of the display matrix is negative."""
    a, b, _, c, d = struct.unpack_from(">5i", header, 52 if header[0] == 1 else 40)
    return a * d - b * c < 0


def _sizes(samples: dict[bytes, list[memoryview]]) -> np.ndarray:
    """Bytes of each sample."""
    _, same_size, number = struct.unpack_from(">III", samples[b"stsz"][0])
    if same_size:
        raise Unsupported("frames of one size")  # uncompressed video, whose samples may be parts of frames
    sizes = np.frombuffer(samples[b"stsz"][0][12:], ">u4")
    if len(sizes) < number:
        raise Unsupported("incomplete stsz")
    return sizes[:number]


def _presentation_times(samples: dict[bytes, list[memoryview]], number: int) -> np.ndarray:
    """int64 [number], in the order of the samples, which is that of decoding."""
    steps = _repeated(samples[b"stts"][0], ">i4", number)
    if (steps < 0).any():
        raise Unsupported("decoding times that descend")
    times = np.cumsum(steps) - steps
    return times + _repeated(samples[b"ctts"][0], ">i4", number) if b"ctts" in samples else times


def _edit(track: dict[bytes, list[memoryview]], timescale: int, movie_timescale: int) -> tuple[int, int, int]:
    """Return the times between which the track is presented, and what to add to them to get FFmpeg's time stamps."""
    everything = np.iinfo(np.int64).max
    if b"edts" not in track or b"elst" not in (edits := _children(track[b"edts"][0])):
        return -everything, everything, 0
    content = edits[b"elst"][0]
    kind = [("duration", ">u8"), ("start", ">i8")] if content[0] else [("duration", ">u4"), ("start", ">i4")]
    entries = _table(content, [*kind, ("rate", ">i4")])
    pause = sum(int(entry["duration"]) for entry in entries[:-1])
    if len(entries) == 0 or (entries["start"][:-1] != -1).any() or entries["rate"][-1] != 1 << 16:
        raise Unsupported("an edit list of several parts or another speed")
    start, duration = int(entries["start"][-1]), int(entries["duration"][-1])
    if start < 0:
        raise Unsupported("nothing is presented")
    end = start + _rescaled(duration, timescale, movie_timescale) if duration else everything
    return start, end, _rescaled(pause, timescale, movie_timescale) - start


def _rescaled(duration: int, timescale: int, movie_timescale: int) -> int:
    return (2 * duration * timescale + movie_timescale) // (2 * movie_timescale)


def _table(content: memoryview, columns: list[tuple[str, str]]) -> np.ndarray:
    """The rows of a table: a header of four bytes, the number of rows, the rows."""
    number = _number(content, ">I", 4, 4)
    rows = np.dtype(columns)
    if 8 + number * rows.itemsize > len(content):
        raise Unsupported("incomplete table")
    return np.frombuffer(content, rows, number, offset=8)


def _repeated(content: memoryview, kind: str, number: int) -> np.ndarray:
    """int64 [number], from a table of numbers and how often each is repeated."""
    rows = _table(content, [("times", ">u4"), ("value", kind)])
    times = rows["times"].astype(np.int64)
    if times.sum() != number:
        raise Unsupported("tables of different lengths")
    return np.repeat(rows["value"].astype(np.int64), times)


def _number(content: memoryview, kind: str, offset: int, offset_of_version_1: int) -> int:
    return struct.unpack_from(kind, content, offset_of_version_1 if content[0] == 1 else offset)[0]
