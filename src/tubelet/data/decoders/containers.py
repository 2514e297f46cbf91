"""Files whose frames other libraries than PyAV get wrong."""

import functools
import logging

from tubelet.data.decoders.files import PathOrFile, identity, opened
from tubelet.data.decoders.mp4 import FIRST_BOXES, read_movie

logger = logging.getLogger(__name__)

MATROSKA, CLUSTER, POSE_YAW = b"\x1a\x45\xdf\xa3", b"\x1f\x43\xb6\x75", b"\x76\x73"
"""IDs of Matroska's elements: the first one, frames, and the angle about the vertical axis, which is for mirroring."""
MAX_HEADER = 1 << 16


def only_pyav_is_right(source: PathOrFile, decoder: str) -> bool:
    """Whether decord or torchcodec may give other frames of a file than FFmpeg presents, or turn them wrongly."""
    known = identity(source)
    reason = _reason(source, decoder) if known is None else _reason_of_path(*known, decoder)
    if reason:
        _log_once(decoder, reason)
    return bool(reason)


@functools.lru_cache(1 << 16)
def _reason_of_path(path: str, size: int, modified: int, decoder: str) -> str:
    return _reason(path, decoder)


@functools.lru_cache
def _log_once(decoder: str, reason: str) -> None:
    logger.info("files with %s are decoded with pyav, because %s gives other frames of them", reason, decoder)


def _reason(source: PathOrFile, decoder: str) -> str:
    """What a library gets wrong; empty where it is right."""
    with opened(source) as file:
        start = file.read(8)
        movie = read_movie(file) if start[4:] in FIRST_BOXES else None
        file.seek(0)
        header = file.read(MAX_HEADER) if start[:4] == MATROSKA and decoder == "torchcodec" else b""
    if start[4:] not in FIRST_BOXES and not header:
        return "another container than mp4" + (" and matroska" if decoder == "torchcodec" else "")
    tracks = movie.tracks if movie is not None else []
    if POSE_YAW in header.split(CLUSTER)[0] or any(track.mirrored for track in tracks):
        return "mirrored pictures"
    if any(track.trimmed for track in tracks):
        return "frames that an edit list hides"
    if decoder == "decord" and movie is None:
        return "no complete tables"
    if decoder == "decord" and any(track.has_leading for track in tracks):
        return "frames that follow a key frame and are presented before it (open GOP)"
    return ""
