"""Features of videos on disk, so that they are extracted once for all heads, seeds and tasks."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class FeatureCache:
    """Tokens [segments, views, N, D] of videos in `folder`, for one encoder and one way of making clips.

    `key` says all that the tokens depend on but the video: two caches of different keys may share a folder. A video is
    known by its path, size and time of change. Files appear whole or not at all, so that several processes may fill one
    folder, and an interrupted extraction goes on where it was.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.prefix = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._found: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob(f"{self.prefix}-*.safetensors")):
            with safe_open(path, "pt") as file:
                names = json.loads(file.metadata()["videos"])
            self._found |= {name: (path, row) for row, name in enumerate(names)}

    def __contains__(self, path: str) -> bool:
        return identity(path) in self._found

    def add(self, paths: Sequence[str], tokens: Tensor) -> None:
        """Keep tokens [len(paths), segments, views, N, D]."""
        names = [identity(path) for path in paths]
        content = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        path = self.folder / f"{self.prefix}-{content}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{uuid.uuid4().hex}.tmp")  # processes of several hosts may have the same number
        save_file({"tokens": tokens.contiguous()}, aside, metadata={"videos": json.dumps(names)})
        os.replace(aside, path)
        self._found |= {name: (path, row) for row, name in enumerate(names)}

    def read(self, paths: Sequence[str], reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Tokens in the order of `paths`, which must all be in the cache; `reduce` is applied to each file's."""
        places = [self._found[identity(path)] for path in paths]
        read: Tensor | None = None
        for shard in dict.fromkeys(path for path, _ in places):
            with safe_open(shard, "pt") as file:
                stored = reduce(file.get_tensor("tokens"))
            if read is None:
                read = stored.new_empty((len(places), *stored.shape[1:]))
            to, of = torch.tensor([(i, row) for i, (path, row) in enumerate(places) if path == shard]).T
            read[to] = stored[of]
        if read is None:
            raise ValueError("no paths given")
        return read


def identity(path: str) -> str:
    """What a video is known by: path, size, time of change."""
    if not os.path.exists(path):
        return path
    stat = os.stat(path)
    return f"{os.path.abspath(path)}|{stat.st_size}|{stat.st_mtime_ns}"
