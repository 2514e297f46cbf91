"""Decoded videos on disk: for small sets of short videos, where opening and decoding would cost more than training."""

import contextlib
import hashlib
import os
import uuid

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from tubelet.data.decoders import open_video, read_frames


class CachedVideo:
    """All frames of a video in `folder`, uint8, decoded once, then read from there: a `Video` like any other.

    Processes and runs share the files, and the system drops them from memory when it must. A file belongs to a video's
    path, size, time of change, and the decoder; it appears under its name only when it is complete.
    """

    def __init__(self, path: str, decoder: str, folder: str):
        status = os.stat(path)
        identity = f"{os.path.abspath(path)}|{status.st_size}|{status.st_mtime_ns}|{decoder}"
        name = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
        cached = os.path.join(folder, f"{name}.safetensors")
        if not os.path.exists(cached):
            _decode(path, decoder, cached)
        file = safe_open(cached, framework="np")
        self._frames, self.fps = file.get_slice("frames"), float(file.metadata()["fps"])
        self.num_frames = self._frames.get_shape()[0]

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        first, last = int(indices[0]), int(indices[-1])
        return self._frames[first : last + 1][indices - first]


def _decode(path: str, decoder: str, cached: str) -> None:
    """Under another name first: processes that fill the same cache, and kills, must not leave half a file.

    Processes of several hosts may have the same number, so the name is a random one.
    """
    video = open_video(path, decoder)
    frames = read_frames(video, np.arange(video.num_frames), path)
    os.makedirs(os.path.dirname(cached), exist_ok=True)
    # An upright video's frames are rotated views, whose bytes lie in another order.
    content = save({"frames": np.ascontiguousarray(frames)}, metadata={"fps": repr(video.fps)})
    unfinished = f"{cached}.{uuid.uuid4().hex}.part"
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
        os.replace(unfinished, cached)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise
