"""Decoded videos and their sound on disk, for small data sets of short videos, where decoding would take longer than
training.
"""

import hashlib
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from tubelet.data import storage
from tubelet.data.decoders import PathOrFile, open_video, read_frames
from tubelet.data.options import Decoder
from tubelet.data.sound import SoundTrack, decode_sound
from tubelet.runtime.files import write_atomic

VERSION = 3
"""Of the content of the files, which are made anew where it is another one."""


class CachedVideo:
    """A `Video` whose frames are decoded once into a uint8 file and read from there afterwards.

    Processes and runs share the files, which the operating system keeps in its page cache. A file is identified by the
    video's path, size and modification time and by the decoder, and gets its name only when it is complete.

    Args:
        path: The video.
        decoder: See `open_video`.
        folder: Folder of the cached files.
        source: Where to read the video; None: the file `path`.
        status: Size and version of the video; None: those of the file `path`.
    """

    def __init__(
        self,
        path: str,
        decoder: Decoder | str,
        folder: str,
        source: PathOrFile | None = None,
        status: storage.Status | None = None,
    ):
        options = Decoder.model_validate(decoder)
        status = status or storage.status(path, storage.DEFAULT_STORAGE)
        cached = _file_of(path, status, folder, f"{VERSION}|{options.model_dump()}")
        if not os.path.exists(cached):
            _decode(path, path if source is None else source, options, cached)
        file = safe_open(cached, framework="np")
        self._frames, self.times = file.get_slice("frames"), file.get_tensor("times")
        self.fps = float(file.metadata()["fps"])
        self.num_frames = self._frames.get_shape()[0]

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        first, last = int(indices[0]), int(indices[-1])
        return self._frames[first : last + 1][indices - first]


def cached_sound(path: str, channels: int, folder: str, source: PathOrFile, status: storage.Status) -> SoundTrack:
    """Return the sound track of a video, which is decoded once into a file and read from there afterwards.

    Args:
        path: The video.
        channels: See `read_sound`.
        folder: Folder of the cached files.
        source: Where to read the video.
        status: Size and version of the video.

    Raises:
        SoundError: There is no sound track, or it cannot be decoded; also where only another span of it cannot.
    """
    cached = _file_of(path, status, folder, f"{VERSION}|sound|{channels}")
    if not os.path.exists(cached):
        track = decode_sound(source, channels)
        os.makedirs(folder, exist_ok=True)
        tensors = {f"{i:06} {first}": np.ascontiguousarray(run) for i, (first, _, run) in enumerate(track.runs)}
        write_atomic(Path(cached), save(tensors, metadata={"start": str(track.video_start), "rate": str(track.rate)}))
    file = safe_open(cached, framework="np")
    metadata = file.metadata()
    slices = [(int(name.split()[1]), file.get_slice(name)) for name in sorted(file.keys())]
    runs = [(first, first + run.get_shape()[0], run) for first, run in slices]
    return SoundTrack(path, Fraction(metadata["start"]), int(metadata["rate"]), runs)


def _file_of(path: str, status: storage.Status, folder: str, how: str) -> str:
    """Return the path of the cached file of a version of a video that is decoded in some way."""
    name = storage.public(path) if storage.is_remote(path) else os.path.abspath(path)
    identity = f"{name}|{status.size}|{status.version}|{how}".encode(errors="surrogateescape")
    return os.path.join(folder, f"{hashlib.sha256(identity).hexdigest()[:32]}.safetensors")


def _decode(path: str, source: PathOrFile, decoder: Decoder, cached: str) -> None:
    """Decode all frames into the file `cached`."""
    video = open_video(source, decoder)
    frames = read_frames(video, np.arange(video.num_frames), path)
    os.makedirs(os.path.dirname(cached), exist_ok=True)
    # Frames of a rotated video are strided views, whose bytes are in another order.
    tensors = {"frames": np.ascontiguousarray(frames), "times": video.times}
    write_atomic(Path(cached), save(tensors, metadata={"fps": repr(video.fps)}))
