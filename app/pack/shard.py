"""Write one shard: its clips, the index of its tar file, and its rows of the table."""

import io
import json
import os
import shutil
import tarfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from app.pack.encode import Clip, NotFaithful, encode_video
from app.pack.options import Options
from tubelet.config.addresses import public
from tubelet.data import shard_index, storage
from tubelet.data.decoders import first_line
from tubelet.data.sources import NO_LABEL
from tubelet.data.storage import StorageConfig
from tubelet.runtime.files import remove_leftovers, replacing, write_atomic

SCHEMA = pa.schema(
    {
        "key": pa.string(),
        "path": pa.string(),
        "source": pa.string(),
        "label": pa.int64(),
        "start": pa.float64(),
        "duration": pa.float64(),
        "frames": pa.int64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "size": pa.int64(),
        "psnr": pa.float64(),
        "readable": pa.bool_(),
        "reason": pa.string(),
    }
)
"""Of the table: a row for each clip, and one for each video that cannot be read, with the reason. `path` is that of the
clip, relative to the table, or its shard; start and duration are seconds in the source, psnr is in dB."""


class ShardWriter:
    """Writes shard `number`. Its table gets its name last: a shard with a table is complete."""

    def __init__(self, options: Options, number: int):
        self.options, self.number = options, number
        self.folder, self.name = options.output_folder, f"shard-{number:06d}"

    @property
    def table(self) -> Path:
        return self.folder / "tables" / f"{self.name}.parquet"

    def is_complete(self) -> bool:
        return self.table.is_file()

    def write(
        self, videos: Sequence[tuple[str, int]], unreadable: Mapping[int, str], started: Callable[[int], None]
    ) -> None:
        """Encode and write the videos of this shard.

        Args:
            videos: Path and label of each.
            unreadable: Index in `videos` -> reason, of those that must not be read.
            started: Called with the index of each video before it is read.
        """
        self._remove_leftovers()
        rows: list[dict[str, Any]] = []
        with _Writer(self.folder, self.name, self.options.format) as writer:
            for index, (path, label) in enumerate(videos):
                started(index)
                try:
                    if index in unreadable:
                        raise NotFaithful(unreadable[index])
                    clips = self._encode(path)
                except Exception as error:  # of FFmpeg, of any type
                    reason = str(error) if isinstance(error, NotFaithful) else first_line(error)
                    row = {"source": source_name(path), "label": label, "readable": False, "reason": as_text(reason)}
                    rows.append(row)
                    continue
                for part, clip in enumerate(clips):
                    key = f"{self.number * self.options.videos_per_shard + index:08d}"
                    key = f"{key}-{part:04d}" if self.options.encoding.clip_seconds else key
                    row = _row(key, path, label, clip) | {"path": writer.path(key)}
                    writer.add(key, clip.content, label, {k: v for k, v in row.items() if k not in ("key", "path")})
                    rows.append(row)
        self.table.parent.mkdir(exist_ok=True)
        with replacing(self.table) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)

    def _encode(self, path: str) -> list[Clip]:
        return list(encode_video(path, self.options.encoding, self.options.verification, self.options.data.storage))

    def _remove_leftovers(self) -> None:
        """Remove what a killed process has left of this shard."""
        for path in self.folder.glob(f"{self.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        remove_leftovers(self.table.parent, self.table.name)


def source_name(path: str) -> str:
    """Return the name of a video in the table, without credentials."""
    return as_text(public(path))


def as_text(name: str) -> str:
    """Return a text that is UTF-8, which Parquet needs: other bytes of the names of files become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _row(key: str, path: str, label: int, clip: Clip) -> dict[str, Any]:
    values = {name: value for name, value in clip._asdict().items() if name != "content"}
    about = {"source": source_name(path), "label": label, "size": len(clip.content), "readable": True}
    return {"key": key, **about, **values}


class _Writer:
    """Writes clips to a tar file or a folder that gets its name when it is complete, if it has any clip."""

    def __init__(self, folder: Path, name: str, kind: str):
        self._as_tar, self._count = kind == "shards", 0
        self._final = folder / (f"{name}.tar" if self._as_tar else name)
        self._temporary = self._final.with_name(f"{self._final.name}.{uuid.uuid4().hex}.tmp")

    def __enter__(self) -> "_Writer":
        if self._as_tar:
            self._tar = tarfile.open(self._temporary, "w")
        else:
            self._temporary.mkdir()
        return self

    def path(self, key: str) -> str:
        return self._final.name if self._as_tar else f"{self._final.name}/{key}.mp4"

    def add(self, key: str, content: bytes, label: int, about: dict[str, Any]) -> None:
        self._count += 1
        if not self._as_tar:
            (self._temporary / f"{key}.mp4").write_bytes(content)
            return
        files = {"json": json.dumps(about).encode(), "mp4": content}
        if label != NO_LABEL:
            files = {"cls": b"%d" % label, **files}
        for suffix, data in files.items():
            member = tarfile.TarInfo(f"{key}.{suffix}")  # without times and owners: equal videos give equal shards
            member.size = len(data)
            self._tar.addfile(member, io.BytesIO(data))

    def __exit__(self, kind: object, *_: object) -> None:
        if self._as_tar:
            self._tar.close()
        if kind is None and self._count:
            if self._as_tar:
                self._write_index()
            os.replace(self._temporary, self._final)
        elif self._as_tar:
            self._temporary.unlink()
        else:
            shutil.rmtree(self._temporary)

    def _write_index(self) -> None:
        index = shard_index.scan(str(self._temporary), "cls", StorageConfig())
        content = shard_index.dump(index, storage.status(str(self._temporary), StorageConfig()).size, "cls")
        write_atomic(self._final.with_name(self._final.name + shard_index.SIDECAR), content)
