"""Write an index, with any number of processes on any number of hosts that share its folder.

The list of files is made once and cut into parts. A process claims a part, describes its files and writes them, so that
a kill loses at most the parts in progress. Who finds all parts done joins them. Rows of unchanged files (path, size and
time of modification) are taken from the index that is replaced.
"""

import contextlib
import functools
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tubelet.config import ConfigError
from tubelet.data.list_forms import NO_LABEL
from tubelet.data.row_store import RowStore, RowStoreWriter
from tubelet.indexing.claims import STALE_SECONDS, Claim, claim
from tubelet.indexing.describe import Row, describe
from tubelet.indexing.options import SCHEMA, VERSION, ReadingOptions
from tubelet.indexing.readers import Readers
from tubelet.indexing.table import read_metadata, write_index
from tubelet.indexing.walk import find_files
from tubelet.runtime.files import read_json, remove_leftovers, replacing, write_json
from tubelet.runtime.progress import progress

logger = logging.getLogger(__name__)

NAMES_AT_ONCE = 1 << 16
POLL_SECONDS = 2.0
LISTING_SECONDS = 6 * 3600.0
"""Time after which another process lists the files again; the claim is not renewed while folders are read."""


def build(
    index: Path,
    datasets: list[str],
    options: ReadingOptions,
    *,
    processes: int,
    part_size: int = 1000,
    relative: bool = False,
    job: str | None = None,
    show_progress: bool = True,
) -> bool:
    """Write the index of the videos in folders and lists, together with the other processes that do.

    Args:
        index: The Parquet file.
        datasets: Folders, lists, indexes and files.
        options: What is read of each file.
        processes: Processes that read files.
        part_size: Files of a part.
        relative: Name files below the index's folder by relative paths.
        job: Name of the job that this process belongs to. An index that its other processes have completed before is
            not checked for changes.
        show_progress: Show a progress bar.

    Returns:
        Whether this process completed the index; False where another one did.

    Raises:
        ConfigError: An entry of `datasets` has no files, or an unfinished index was begun with other options.
    """
    work = None
    while work is None:
        if job is not None and read_metadata(index).get("job") == job:
            return False
        with contextlib.suppress(_Completed):
            work = Work(index, datasets, options, part_size, relative)
    stale_seconds = max(STALE_SECONDS, 3 * options.file_seconds)
    bar = progress(desc="index", total=len(work.files), unit="file", off=not show_progress)
    failed = functools.partial(_failed, options=options)
    with Readers(functools.partial(_describe_changed, options), processes, options.file_seconds, failed) as readers:
        for part in work.unfinished(stale_seconds):
            if isinstance(part, int):
                bar.update(len(work.rows_of(part)))
            else:
                number, claimed = part
                work.write_part(number, work.describe(number, readers, claimed, bar))
                claimed.release()
    bar.close()
    return work.join(stale_seconds, job)


class _Completed(Exception):
    """Other processes have completed the index and removed the folder while this one was opening it."""


class Work:
    """The folder of an index in progress, beside the index: `files.rows`, `part-*.parquet` and claims."""

    def __init__(self, index: Path, datasets: list[str], options: ReadingOptions, part_size: int, relative: bool):
        self.index, self.options, self._part_size = index, options, part_size
        self.folder = index.with_name(f"{index.name}.work")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._root = index.absolute().parent
        self._listed = self.folder / "files.rows"
        self._check_same({"datasets": datasets, "part_size": part_size, "relative": relative, **_identity(options)})
        while not self._listed.exists():
            if not self.folder.exists():
                raise _Completed
            if (claimed := claim(self.folder / "files.claim", LISTING_SECONDS)) is None:
                time.sleep(POLL_SECONDS)
                continue
            try:
                files = find_files(datasets)
                self._write_files([(self._name(path) if relative else path, label) for path, label in files])
            finally:
                claimed.release()
        try:
            store = RowStore(self._listed)
        except FileNotFoundError:
            raise _Completed from None
        self.files, self._labels = store.strings(), store.integers("label")
        self._reuse = read_metadata(index).get("reading") == _identity(options)

    @property
    def num_parts(self) -> int:
        return -(-len(self.files) // self._part_size)

    def rows_of(self, part: int) -> range:
        return range(part * self._part_size, min((part + 1) * self._part_size, len(self.files)))

    def path_of(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.parquet"

    def unfinished(self, stale_seconds: float) -> Iterator[int | tuple[int, Claim]]:
        """Yield each part: claimed, or its number where it is found done. Waits for parts that others have claimed."""
        remaining = list(range(self.num_parts))
        while remaining:
            waiting = []
            for part in remaining:
                if self.path_of(part).exists() or not self.folder.exists():
                    yield part
                elif (claimed := claim(self.folder / f"part-{part:06d}.claim", stale_seconds)) is None:
                    waiting.append(part)
                elif self.path_of(part).exists():  # done between the two checks
                    claimed.release()
                    yield part
                else:
                    yield part, claimed
            if waiting == remaining:
                time.sleep(POLL_SECONDS)
            remaining = waiting

    def describe(self, part: int, readers: Readers, claimed: Claim, bar: Any) -> list[Row]:
        """Return the rows of a part."""
        rows = self.rows_of(part)
        names, labels = self.files[rows.start : rows.stop], self._labels[rows.start : rows.stop]
        known = self._known(names)
        found: dict[str, Row] = {}
        for (name, _, _), row in readers.map((name, self._root, _identity_of(known.get(name))) for name in names):
            found[name] = known[name] if row is None else row
            claimed.renew()
            bar.update()
        columns = [{"label": None if label == NO_LABEL else label} for label in labels]
        return [found[name] | _path_columns(name) | column for name, column in zip(names, columns, strict=True)]

    def write_part(self, part: int, rows: list[Row]) -> None:
        try:
            with replacing(self.path_of(part)) as temporary:
                pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
        except FileNotFoundError:
            if self.folder.exists():  # otherwise another process did this part, too, and all is joined
                raise

    def join(self, stale_seconds: float, job: str | None) -> bool:
        """Join the parts and remove the folder; or wait until another process has done so, and return False."""
        while self.folder.exists():
            if (claimed := claim(self.folder / "join.claim", stale_seconds)) is None:
                time.sleep(POLL_SECONDS)
                continue
            metadata = {"reading": _identity(self.options), "job": job}
            remove_leftovers(self.index.parent, self.index.name)
            write_index(self.index, self._tables(claimed), metadata)
            done = self.folder.with_name(f".{self.folder.name}.{uuid.uuid4().hex}")
            os.rename(self.folder, done)
            shutil.rmtree(done)
            return True
        return False

    def _tables(self, claimed: Claim) -> Iterator[pa.Table]:
        for part in range(self.num_parts):
            claimed.renew()
            yield pq.read_table(self.path_of(part), schema=SCHEMA)

    def _check_same(self, settings: dict[str, Any]) -> None:
        stored = self.folder / "options.json"
        if not self._listed.exists():
            write_json(stored, settings)
        if (begun := read_json(stored)) is None:
            raise _Completed
        if different := [key for key in settings if begun.get(key) != settings[key]]:
            raise ConfigError(
                f"{self.folder} is an unfinished index with another {' and '.join(different)}; finish it with the same "
                "options, or remove the folder"
            )

    def _write_files(self, files: list[tuple[str, int]]) -> None:
        with replacing(self._listed) as temporary, open(temporary, "wb") as file:
            writer = RowStoreWriter(file)
            for start in range(0, len(files), NAMES_AT_ONCE):
                names = [os.fsencode(name) for name, _ in files[start : start + NAMES_AT_ONCE]]
                writer.add(b"".join(names), np.array([len(name) for name in names]))
            writer.finish({"label": np.array([label for _, label in files], np.int32)})

    def _name(self, path: str) -> str:
        below = os.path.relpath(path, self._root)
        return path if below.startswith("..") else below

    def _known(self, names: list[str]) -> dict[str, Row]:
        """Return the rows that the present index has for these files, sorted names."""
        if not self._reuse:
            return {}
        between = [("path", ">=", _path_columns(names[0])["path"]), ("path", "<=", _path_columns(names[-1])["path"])]
        rows = pq.read_table(self.index, filters=between, schema=SCHEMA).to_pylist()
        wanted = set(names)
        return {row["path"]: row for row in rows if row["path"] in wanted}


def _identity(options: ReadingOptions) -> dict[str, Any]:
    """Return what the rows depend on, except the files."""
    return {"version": VERSION, **options.model_dump(exclude={"file_seconds"})}


def _identity_of(row: Row | None) -> tuple[int, int] | None:
    return None if row is None else (row["size"], row["mtime"])


def _describe_changed(options: ReadingOptions, name: str, root: Path, known: tuple[int, int] | None) -> Row | None:
    """Return the row of a file, None where its size and time of modification are known."""
    path = os.path.join(root, name)
    if known is not None and known == _size_and_time(path):
        return None
    return describe(path, options)


def _size_and_time(path: str) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None  # `describe` gives the reason
    return status.st_size, status.st_mtime_ns


def _failed(reason: str, options: ReadingOptions) -> Row:
    return {"readable": False, "reason": reason}


def _path_columns(name: str) -> Row:
    """Return the path as a column; Parquet has only UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        path = os.fsencode(name).decode("utf-8", "backslashreplace")
        return {"path": path, "readable": False, "reason": "the name of the file is not UTF-8; rename it"}
    return {"path": name}
