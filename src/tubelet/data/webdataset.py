"""WebDataset tar shards: a sample is the files of a shard whose names differ only in what follows the first dot.

Entries of `data.datasets` are shards, patterns such as `train-{000000..000099}.tar`, folders, or lists with a shard or
pattern per line; local or remote. Unlike the library of that name, which reads shards from beginning to end, samples
are read in any order by an index of the tar headers. So batches depend on the seed and the step only, as with all
formats.
"""

import json
import re
from typing import Any, BinaryIO, cast

import numpy as np
from pydantic import Field

from tubelet.config import ConfigError
from tubelet.config.registry import PartOptions
from tubelet.data import storage, video_dataset
from tubelet.data.decoders import Video
from tubelet.data.options import DataConfig
from tubelet.data.rows import Numbers, Rows
from tubelet.data.shard_index import ShardIndex, index_shards
from tubelet.data.shard_list import expand
from tubelet.data.sources import VIDEO_SUFFIXES, Source
from tubelet.data.storage import Status
from tubelet.data.types import VideoError

_NUMBER = re.compile(r"#(\d+)/")


class FormatOptions(PartOptions):
    """Options of `data.format`."""

    name: str = "webdataset"
    video: str | None = None
    """Suffix of the videos, such as mp4; None: the first file of a sample that has the suffix of a video."""
    label: str | None = "cls"
    """Where the class is: the suffix of a file with an integer, `json.<field>`, or None. -1 where a sample has none."""
    targets: dict[str, str] = Field({}, examples=[{"caption": "txt", "score": "json.score"}])
    """Further targets of the batches: name -> the suffix of a text file, or `json.<field>`."""


class Dataset(video_dataset.Dataset):
    """Like `video_dataset.Dataset`; a sample's path is its shard, its number there and its key: `a.tar#17/key.mp4`."""

    def __init__(self, data: DataConfig, transform: video_dataset.Transform, **options: Any):
        self._shards: dict[str, ShardIndex] = {}
        self._videos: dict[str, np.ndarray] = {}
        self._versions: dict[str, str] = {}
        super().__init__(data, transform, **options)

    @property
    def options(self) -> FormatOptions:
        assert isinstance(self.data.format, FormatOptions)
        return self.data.format

    def find_samples(self, entry: str) -> Source:
        shards = expand(entry, self.data.storage)
        indexes = index_shards(shards, self.options.label, self.data.storage)
        numbers, labels = [], []
        for shard, index in zip(shards, indexes, strict=True):
            self._shards[shard], self._videos[shard] = index, index.member_with(self._is_video)
            with_video = np.flatnonzero(self._videos[shard] >= 0)
            numbers.append(with_video)
            labels.append(index.labels[with_video])
        paths = _Paths(shards, indexes, numbers, [self._videos[shard] for shard in shards])
        if not len(paths):
            suffixes = self.options.video or " ".join(sorted(suffix[1:] for suffix in VIDEO_SUFFIXES))
            raise ConfigError(f"data.datasets: '{storage.public(entry)}': no sample has a video ({suffixes})")
        return Source(paths, Numbers(np.concatenate(labels)))

    def open(self, path: str) -> Video:
        shard, number = self._locate(path)
        member = int(self._videos[shard][number])
        index = self._shards[shard]
        start, size = int(index.offsets[member]), int(index.sizes[member])
        try:
            if self.data.cache is not None and shard not in self._versions:
                self._versions[shard] = storage.status(shard, self.data.storage).version
            file = storage.open_part(shard, self.data.storage, start, size)
        except OSError as error:
            raise VideoError(path, storage.reason(error)) from error
        file.name = path
        return self.decode(path, cast(BinaryIO, file), Status(size, f"{self._versions.get(shard)}|{start}"))

    def targets(self, index: int) -> dict[str, Any]:
        read = {name: self._read_target(index, where) for name, where in self.options.targets.items()}
        return {**super().targets(index), **read}

    def _locate(self, path: str) -> tuple[str, int]:
        """Return the shard of a sample and the sample's number there."""
        numbers = _NUMBER.finditer(path)
        return next((path[: m.start()], int(m[1])) for m in numbers if path[: m.start()] in self._shards)

    def _is_video(self, suffix: str) -> bool:
        if self.options.video is not None:
            return suffix == self.options.video
        return f".{suffix.rpartition('.')[2]}" in VIDEO_SUFFIXES

    def _read_target(self, sample: int, where: str) -> Any:
        path = self.paths[sample]
        shard, number = self._locate(path)
        index = self._shards[shard]
        suffix, _, field = where.partition(".") if where.startswith("json.") else (where, "", "")
        members = range(int(index.first[number]), int(index.first[number + 1]))
        member = next((m for m in members if index.names[index.suffixes[m]] == suffix), None)
        if member is None:
            raise VideoError(path, f"data.format.targets: the sample has no file .{suffix}")
        try:
            start, size = int(index.offsets[member]), int(index.sizes[member])
            with storage.open_part(shard, self.data.storage, start, size) as file:
                content = file.read()
            return json.loads(content)[field] if field else content.decode("utf-8")
        except OSError as error:
            raise VideoError(path, f"its file .{suffix}: {storage.reason(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise VideoError(path, f"data.format.targets: no {where} there: {type(error).__name__}") from error


class _Paths(Rows[str]):
    """The paths of the samples, made when they are asked for."""

    def __init__(
        self, shards: list[str], indexes: list[ShardIndex], numbers: list[np.ndarray], videos: list[np.ndarray]
    ):
        self._shards, self._indexes, self._numbers, self._videos = shards, indexes, numbers, videos
        self._ends = np.cumsum([len(of_shard) for of_shard in numbers])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _row(self, sample: int) -> str:
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        index, of_shard = self._indexes[shard], self._numbers[shard]
        number = int(of_shard[sample - (self._ends[shard] - len(of_shard))])
        suffix = index.names[index.suffixes[self._videos[shard][number]]]
        return f"{self._shards[shard]}#{number}/{index.key(number)}.{suffix}"
