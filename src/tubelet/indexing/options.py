"""What is read of each file, and the columns of an index."""

from typing import Literal

import pyarrow as pa
from pydantic import Field

from tubelet.config import Config

VERSION = 1
"""Of the columns; the rows of an index of another version are not reused."""

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("size", pa.int64()),  # bytes
        ("mtime", pa.int64()),  # nanoseconds since 1970
        ("container", pa.string()),  # FFmpeg's name of the format
        ("codec", pa.string()),
        ("width", pa.int32()),  # as stored, before rotation
        ("height", pa.int32()),
        ("frames", pa.int64()),
        ("frames_from", pa.string()),  # header, duration (times the rate) or scan (of all packets)
        ("duration", pa.float64()),  # seconds
        ("fps", pa.float64()),  # frames per second on average
        ("key_frame_seconds", pa.float32()),  # median distance of two key frames
        ("audio", pa.string()),  # codec; null: no audio
        ("rotation", pa.int16()),  # degrees counterclockwise by which the frames are turned for display
        ("readable", pa.bool_()),
        ("reason", pa.string()),  # why it is not readable
        ("content_hash", pa.string()),
        ("label", pa.int64()),
        ("perceptual_hash", pa.uint64()),  # null: the frames are of a single color
    ]
)


class ReadingOptions(Config):
    """What is read of each file."""

    content_hash: Literal["blocks", "file"] | None = "blocks"
    """BLAKE2b of the size and of the first, middle and last 64 KiB, or of the whole file; null: none."""
    perceptual_hash: bool = True
    """Decode four frames for a hash by which near-duplicates are found; false: decode the first frame only."""
    count_frames: bool = False
    """Count the frames of every file, which reads all of it; false: only where the header does not tell."""
    file_seconds: float = Field(60, gt=0)
    """A file that takes longer counts as unreadable."""
