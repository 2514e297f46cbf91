"""Decoded videos on disk, for small data sets of short videos, where decoding would take longer than training."""

import hashlib
import os
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from tubelet.data import storage
from tubelet.data.decoders import PathOrFile, open_video, read_frames
from tubelet.data.options import Decoder
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
        size, version = status or storage.status(path, storage.DEFAULT_STORAGE)
        name = storage.public(path) if storage.is_remote(path) else os.path.abspath(path)
        identity = f"{name}|{size}|{version}|{VERSION}|{options.model_dump()}"
        name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
        cached = os.path.join(folder, f"{name}.safetensors")
        if not os.path.exists(cached):
            _decode(path, path if source is None else source, options, cached)
        file = safe_open(cached, framework="np")
        self._frames, self.times = file.get_slice("frames"), file.get_tensor("times")
        self.fps = float(file.metadata()["fps"])
        self.num_frames = self._frames.get_shape()[0]

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        first, last = int(indices[0]), int(indices[-1])
        return self._frames[first : last + 1][indices - first]


def _decode(path: str, source: PathOrFile, decoder: Decoder, cached: str) -> None:
    """Decode all frames into the file `cached`."""
    video = open_video(source, decoder)
    frames = read_frames(video, np.arange(video.num_frames), path)
    os.makedirs(os.path.dirname(cached), exist_ok=True)
    # Frames of a rotated video are strided views, whose bytes are in another order.
    tensors = {"frames": np.ascontiguousarray(frames), "times": video.times}
    write_atomic(Path(cached), save(tensors, metadata={"fps": repr(video.fps)}))
