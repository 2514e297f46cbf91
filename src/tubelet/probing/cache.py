"""Features of videos on disk, so that they are extracted once for all heads, seeds and tasks."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tubelet.data.segments import split_segment
from tubelet.runtime.files import replacing, save_tensors


class FeatureCache:
    """Tokens [segments, views, N, D] of videos in `folder`, for one encoder and one way of making clips.

    A video is identified by its path, size and modification time. Files appear complete or not at all, so several
    processes may fill one folder, and an interrupted extraction continues where it stopped.

    Args:
        folder: Caches with different keys may share it.
        key: Everything that the tokens depend on except the video.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        self.prefix = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._locations: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob(f"{self.prefix}-*.safetensors")):
            with safe_open(path, "pt") as file:
                names = json.loads(file.metadata()["videos"])
            self._locations |= {name: (path, row) for row, name in enumerate(names)}

    def __contains__(self, path: str) -> bool:
        return identity(path) in self._locations

    def add(self, paths: Sequence[str], tokens: Tensor) -> None:
        """Store tokens [len(paths), segments, views, N, D]."""
        names = [identity(path) for path in paths]
        # Names that are not UTF-8 hold surrogates, which a plain encode() refuses.
        content = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
        path = self.folder / f"{self.prefix}-{content}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_tensors(temporary, {"tokens": tokens.contiguous()}, {"videos": json.dumps(names)})
        self._locations |= {name: (path, row) for row, name in enumerate(names)}

    def open(self, paths: Sequence[str]) -> "StoredTokens":
        """The tokens of `paths`, all of which must be in the cache; nothing is read yet."""
        return StoredTokens([self._locations[identity(path)] for path in paths])


class StoredTokens:
    """Tokens [n, segments, views, N, D] in files.

    `stored[rows]` reads the rows of an index tensor, in its order, as indexing a tensor in memory does.
    """

    def __init__(self, locations: Sequence[tuple[Path, int]]):
        if not locations:
            raise ValueError("no videos given")
        self._locations = locations

    def __len__(self) -> int:
        return len(self._locations)

    def __getitem__(self, rows: Tensor) -> Tensor:
        locations = [self._locations[row] for row in rows.tolist()]
        tokens: list[Tensor] = [torch.empty(0)] * len(locations)
        for path in dict.fromkeys(path for path, _ in locations):
            with safe_open(path, "pt") as file:
                stored = file.get_slice("tokens")
                for position, (other, row) in enumerate(locations):
                    if other == path:
                        tokens[position] = stored[row]
        return torch.stack(tokens)

    @property
    def nbytes(self) -> int:
        return len(self) * self[torch.tensor([0])].nbytes

    def load(self, reduce: Callable[[Tensor], Tensor] = lambda tokens: tokens) -> Tensor:
        """All rows in memory, after `reduce`, which gets the rows of a file at once."""
        loaded: Tensor | None = None
        for shard in dict.fromkeys(path for path, _ in self._locations):
            with safe_open(shard, "pt") as file:
                stored = reduce(file.get_tensor("tokens"))
            if loaded is None:
                loaded = stored.new_empty((len(self), *stored.shape[1:]))
            to, source = torch.tensor([(i, row) for i, (path, row) in enumerate(self._locations) if path == shard]).T
            loaded[to] = stored[source]
        assert loaded is not None  # __init__ has checked that there are videos
        return loaded


def identity(path: str) -> str:
    """What a video is identified by: path, size and modification time."""
    file, _ = split_segment(path)
    if not os.path.exists(file):
        return path
    stat = os.stat(file)
    return f"{os.path.abspath(path)}|{stat.st_size}|{stat.st_mtime_ns}"
