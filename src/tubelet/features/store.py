"""Parts of features on disk: `table/part-*.parquet` with a row for each clip, `tensors/part-*.safetensors`.

Row i of a table and row i of its tensors are the same clip. Parts appear complete or not at all: the table of a part is
written last, so that a part with a table is complete. Every part is a function of the videos and options, and the rows
of all parts in the order of their names are in the order of the videos and their clips.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from tubelet.config import ConfigError
from tubelet.features.options import ItemsConfig
from tubelet.runtime.files import read_json, replacing, save_tensors, write_json

DESCRIPTION, PART = "tubelet", "tubelet_part"
"""Keys of the metadata of a file: what is the same in all parts, and what is of this part. Both are JSON."""
SCHEMA = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("clip", pa.int32(), nullable=False),
        pa.field("start", pa.float64()),
        pa.field("end", pa.float64()),
    ]
)
STORE = "store.json"


class Row(NamedTuple):
    """A clip: the columns of the table."""

    path: str
    label: int
    clip: int
    start: float | None
    end: float | None


def begin(folder: Path, description: Mapping[str, Any]) -> None:
    """Begin the store of a folder, or continue it.

    Args:
        folder: Folder of the store.
        description: Everything that the features depend on, as JSON types; the same in all shards of a store.

    Raises:
        ConfigError: The folder has features of another description.
    """
    earlier = read_json(folder / STORE)
    if earlier is not None:
        differing = [key for key in description if earlier.get(key) != description[key]]
        if differing:
            lines = "".join(f"\n  {key}: {earlier.get(key)!r} there, {description[key]!r} here" for key in differing)
            raise ConfigError(
                f"{folder} holds features of another encoder or of other videos:{lines}\n"
                "Choose another folder=…, or remove that one"
            )
    for name in ("table", "tensors"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for left_over in (folder / name).glob("*.tmp"):  # of a process that was killed
            left_over.unlink()
    write_json(folder / STORE, description)


def missing_parts(folder: Path, parts: Sequence[int]) -> list[int]:
    """Those of `parts` that are not written yet."""
    return [part for part in parts if not table_path(folder, part).is_file()]


def table_path(folder: Path, part: int) -> Path:
    return folder / "table" / f"part-{part:06d}.parquet"


def tensors_path(table: Path) -> Path:
    """The tensors that belong to the table of a part."""
    return table.parents[1] / "tensors" / f"{table.stem}.safetensors"


def write_part(
    folder: Path,
    part: int,
    rows: Sequence[Row],
    tensors: Mapping[Any, Tensor],
    unreadable: Mapping[str, str],
    description: Mapping[str, Any],
) -> None:
    """Write a part atomically.

    Args:
        folder: Folder of the store.
        part: Number of the part.
        rows: The clips.
        tensors: Features by name, each [len(rows), …].
        unreadable: Path -> reason, of the videos of the part that have no rows.
        description: See `begin`.
    """
    metadata = {
        DESCRIPTION: json.dumps(description),
        PART: json.dumps({"unreadable": {text(path): text(reason) for path, reason in unreadable.items()}}),
    }
    path = table_path(folder, part)
    with replacing(tensors_path(path)) as temporary:
        # One key: several would be written in a random order.
        described = {DESCRIPTION: metadata[DESCRIPTION]}
        save_tensors(temporary, {name: tensor.contiguous() for name, tensor in tensors.items()}, described)
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    columns[0] = tuple(text(name) for name in columns[0])
    table = pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)],
        schema=SCHEMA.with_metadata(metadata),
    )
    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def unreadable(folder: Path, parts: Sequence[int]) -> dict[str, str]:
    """Path -> reason, of the videos of `parts` that have no features."""
    found: dict[str, str] = {}
    for part in parts:
        metadata = pq.read_schema(table_path(folder, part)).metadata
        found |= json.loads(metadata[PART.encode()])["unreadable"]
    return found


def num_rows(folder: Path, parts: Sequence[int]) -> int:
    """The number of clips of `parts`."""
    return sum(pq.read_metadata(table_path(folder, part)).num_rows for part in parts)


def text(name: str) -> str:
    """A path as UTF-8 text; bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode(errors="backslashreplace")


@dataclass(frozen=True)
class Items:
    """Vectors to compare, one for each video or clip.

    Attributes:
        vectors: float32 [n, D].
        labels: int64 [n], -1 where there is none.
        paths: Of each item.
        starts, ends: float64 [n], in seconds.
        videos: int64 [n]; the clips of one video have the same number.
    """

    vectors: Tensor
    labels: Tensor
    paths: list[str]
    starts: np.ndarray
    ends: np.ndarray
    videos: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def caption(self, item: int) -> str:
        """Time and class of an item."""
        times = "" if np.isnan(self.starts[item]) else f"{self.starts[item]:.1f} to {self.ends[item]:.1f} s"
        label = f"class {int(self.labels[item])}" if self.labels[item] >= 0 else ""
        return ", ".join(filter(None, (label, times)))


class Store:
    """A finished store: of a folder of `evals.features`, or of a folder whose subfolders are those of its shards.

    Attributes:
        description: See `begin`.
        table: The rows of all clips.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        here = sorted(self.folder.glob("table/part-*.parquet"))
        self._parts = here or sorted(self.folder.glob("*/table/part-*.parquet"), key=lambda path: path.name)
        if not self._parts:
            raise ConfigError(f"features: {folder} has no features; give the folder of a run of evals.features")
        tables = [pq.read_table(path) for path in self._parts]
        descriptions = {table.schema.metadata[DESCRIPTION.encode()].decode() for table in tables}
        if len(descriptions) > 1:
            raise ConfigError(f"features: the subfolders of {folder} are not the shards of one store; give one of them")
        self.description: dict[str, Any] = json.loads(descriptions.pop())
        self._check_complete()
        self.table = pa.concat_tables([table.replace_schema_metadata() for table in tables])

    def _check_complete(self) -> None:
        numbers = [int(re.sub(r"\D", "", path.stem)) for path in self._parts]
        expected = self.description["num_parts"]
        if numbers != list(range(expected)):
            raise ConfigError(
                f"features: {self.folder} has {len(numbers)} of {expected} parts; run evals.features again with the "
                "same options, and all shards"
            )

    def load(self, kind: str) -> Tensor:
        """The features `kind` of all clips, [n, …], in the type on disk."""
        if kind not in self.description["features"]:
            raise ConfigError(
                f"kind: {self.folder} has {', '.join(self.description['features'])}, no {kind}; extract them with "
                f"features=[{kind}]"
            )
        parts = []
        for path in self._parts:
            with safe_open(tensors_path(path), "pt") as file:
                part = file.get_tensor(kind)
                if len(part):
                    parts.append(part)
                if not part.isfinite().all():
                    raise ConfigError(
                        f"features: {tensors_path(path)} has numbers that are not finite; extract the features again "
                        "from another checkpoint, or with dtype=float32"
                    )
        if not parts:
            raise ConfigError(f"features: {self.folder} has no clips; see its bad_files.txt")
        return torch.cat(parts)

    def items(self, kind: str, unit: str) -> Items:
        """The vectors of clips or videos, see `ItemsConfig`."""
        vectors = self.load(kind).float().flatten(1)
        columns = {name: self.table[name].to_numpy() for name in ("label", "clip", "start", "end")}
        paths = self.table["path"].to_pylist()
        # Not by path: a list may name a file twice.
        videos = torch.from_numpy(np.cumsum(columns["clip"] == 0) - 1)
        labels = torch.from_numpy(columns["label"].copy())
        if unit == "clip":
            return Items(vectors, labels, paths, columns["start"], columns["end"], videos)
        first = np.flatnonzero(columns["clip"] == 0)
        last = np.append(first[1:], len(paths)) - 1
        sums = torch.zeros(len(first), vectors.shape[1]).index_add_(0, videos, vectors)
        return Items(
            vectors=sums / torch.from_numpy(last - first + 1)[:, None],
            labels=labels[first],
            paths=[paths[i] for i in first],
            starts=columns["start"][first],
            ends=columns["end"][last],
            videos=torch.arange(len(first)),
        )


def open_items(options: ItemsConfig, other: str | None = None) -> tuple[Items, Items | None, dict[str, Any]]:
    """The items of a store, those of the `other` store, and the description of the first.

    Raises ConfigError where the stores do not exist, are incomplete or are of different encoders.
    """
    store = Store(options.features)
    items = store.items(options.kind, options.unit)
    if other is None:
        return items, None, store.description
    second = Store(other)
    if second.description["encoder"] != store.description["encoder"]:
        raise ConfigError(f"{options.features} and {other} have features of different encoders; extract them with one")
    ours, theirs = store.description.get("classes"), second.description.get("classes")
    if ours != theirs:
        raise ConfigError(
            f"{options.features} has features of the classes {ours}, {other} of {theirs}, so that equal labels are "
            "other classes; extract them with lists that give labels as numbers"
        )
    return items, second.items(options.kind, options.unit), store.description
