"""Three video decoding libraries behind one small interface.

`open_video(source, decoder)` gives a `Video` with the same frames from each; files of which decord or torchcodec give
other frames are read with PyAV. Frame i is the i-th that is presented, upright (turned and mirrored as the file says),
as 8-bit RGB. A video decodes in a single thread, because the workers of a loader use all cores already. For speed see
`python -m benchmarks loader long_videos`.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from tubelet.config import ConfigError
from tubelet.data.decoders.containers import only_pyav_is_right
from tubelet.data.decoders.decord2 import DecordVideo
from tubelet.data.decoders.files import PathOrFile, first_line, name_of
from tubelet.data.decoders.pyav import PyavVideo
from tubelet.data.decoders.torchcodec import TorchcodecVideo, check_device
from tubelet.data.options import DECODERS, Decoder
from tubelet.data.segments import part_of, split_segment
from tubelet.data.types import VideoError

__all__ = ["DECODERS", "PathOrFile", "Video", "check_decoder", "iter_frames", "name_of", "open_video", "read_frames"]

CHUNK = 64
"""Frames that `iter_frames` reads at a time from decoders without an iterator; those continue without seeking back."""


class Video(Protocol):
    """An open video.

    Attributes:
        num_frames: Number of frames according to the file's index.
        fps: Average frames per second.
        times: float64 [num_frames], seconds from the first frame at which each frame is presented, ascending.
            Exactly i / fps in files of constant rate.
    """

    num_frames: int

    @property
    def fps(self) -> float: ...

    @property
    def times(self) -> np.ndarray: ...

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [T, H, W, 3], one frame for each of the ascending `indices` (repeats allowed)."""
        ...


def open_video(source: PathOrFile, decoder: Decoder | str) -> Video:
    """Open a video with one of `DECODERS`.

    Args:
        source: Path of the file or of a part of it (see `segments`), or a binary file-like object with `read` and
            `seek`, which is read from its beginning and must stay open as long as the video is used.
        decoder: "pyav", "decord" or "torchcodec", or a decoder with its options.

    Raises:
        VideoError: The file cannot be opened or has no frames.
        ImportError: The decoder is not installed.
        ConfigError: The decoder cannot be used here.

    Example:
        >>> video = open_video(io.BytesIO(content), "pyav")
        >>> frames = read_frames(video, np.arange(16), "clip")  # uint8 [16, H, W, 3]
    """
    options = Decoder.model_validate(decoder)
    if isinstance(source, str):
        file, segment = split_segment(source)
        if segment is not None:
            return part_of(open_video(file, options), segment, source)
    try:
        video = _open(source, options)
    except (ImportError, ConfigError):
        raise
    except Exception as error:
        raise VideoError(name_of(source), f"{options.name} cannot open it: {first_line(error)}") from error
    if video.num_frames < 1:
        raise VideoError(name_of(source), f"{options.name} finds no frames")
    return video


def _open(source: PathOrFile, options: Decoder) -> Video:
    if options.name == "pyav" or only_pyav_is_right(source, options.name):
        return PyavVideo(source)
    if options.name == "decord":
        return DecordVideo(source)
    return TorchcodecVideo(source, options.seek_mode, options.device)


def check_decoder(decoder: Decoder) -> None:
    """Raise ConfigError, with the reason, where a decoder does not work on this machine."""
    if decoder.name != "torchcodec":
        return
    try:
        check_device(decoder.device)
    except ImportError as error:
        raise ConfigError(f"data.decoder: torchcodec: {error}") from error


def read_frames(video: Video, indices: np.ndarray, path: str) -> np.ndarray:
    """Decode the frames `indices`, which may be in any order.

    Args:
        video: An open video.
        indices: Frame numbers [T].
        path: Name of the video in error messages.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        VideoError: Decoding fails or gives frames of another number or type.
    """
    unique, inverse = np.unique(indices, return_inverse=True)
    try:
        frames = video.frames_at(unique)
    except Exception as error:
        raise VideoError(path, f"cannot decode frames {unique[0]}..{unique[-1]}: {first_line(error)}") from error
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[0] != len(unique) or frames.shape[3] != 3:
        raise VideoError(path, f"decoding {len(unique)} frames gave {frames.dtype} {list(frames.shape)}")
    return frames if np.array_equal(unique, indices) else frames[inverse]


def iter_frames(video: Video, indices: np.ndarray, path: str) -> Iterator[np.ndarray]:
    """Decode the ascending frames `indices` one by one, so that a long video needs no memory for all of them.

    Args:
        video: An open video. Without a method `iter_frames_at`, `CHUNK` frames are read at a time.
        indices: Frame numbers [T], ascending, without repeats.
        path: Name of the video in error messages.

    Yields:
        uint8 [H, W, 3].

    Raises:
        VideoError: As `read_frames`.
    """
    if not hasattr(video, "iter_frames_at"):
        for first in range(0, len(indices), CHUNK):
            yield from read_frames(video, indices[first : first + CHUNK], path)
        return
    try:
        yield from video.iter_frames_at(indices)
    except Exception as error:
        raise VideoError(path, f"cannot decode frames {indices[0]}..{indices[-1]}: {first_line(error)}") from error
