"""Decoded videos on disk: for small sets of short videos, where opening and decoding would cost more than training."""

import hashlib
import json
import os
import uuid
from pathlib import Path

import numpy as np

from tubelet.datasets.decoders import open_video, read_frames


class CachedVideo:
    """All frames of a video as uint8 .npy in `folder`, decoded once, then mapped into memory: a `Video` like any other.

    Processes and runs share the files, and the system drops them from memory when it must. A file belongs to a video's
    path, size, time of change, and the decoder; it appears under its name only when it is complete.
    """

    def __init__(self, path: str, decoder: str, folder: str):
        status = os.stat(path)
        identity = f"{os.path.abspath(path)}|{status.st_size}|{status.st_mtime_ns}|{decoder}"
        stem = Path(folder) / hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
        pixels, facts = stem.with_suffix(".npy"), stem.with_suffix(".json")
        if not pixels.exists():
            video = open_video(path, decoder)
            frames = read_frames(video, np.arange(video.num_frames), path)
            stem.parent.mkdir(parents=True, exist_ok=True)
            _write(facts, json.dumps({"video": path, "fps": video.fps}).encode())
            _write(pixels, frames)
        self._frames = np.load(pixels, mmap_mode="r")
        self.num_frames, self.fps = len(self._frames), json.loads(facts.read_bytes())["fps"]

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        return np.asarray(self._frames[indices])


def _write(path: Path, content: bytes | np.ndarray) -> None:
    """Under another name first: processes that fill the same cache, and kills, must not leave half a file.

    Processes of several hosts may have the same number, so the name is a random one.
    """
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    with unfinished.open("wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            np.save(file, content)
    unfinished.replace(path)
