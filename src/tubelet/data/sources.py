"""The folders, lists and files of `data.datasets`: read them as paths and labels, and write lists."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tubelet.config import ConfigError
from tubelet.data import storage
from tubelet.data.index_file import INDEX_SUFFIX, open_index
from tubelet.data.rows import Numbers, Rows, Strings
from tubelet.data.storage import DEFAULT_STORAGE, StorageConfig, is_remote, public
from tubelet.data.text_list import NO_LABEL, ListEntries, ListLabels, ListPaths, parse_line

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".asf",
        ".avi",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ]
)
IMAGE_SUFFIXES = frozenset([".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"])
LIST_SUFFIXES = frozenset([".csv", ".list", ".lst", ".tsv", ".txt"])
OTHER_FORMATS = {".tar": "webdataset", **dict.fromkeys(IMAGE_SUFFIXES, "mixed_dataset")}
"""Suffix -> the data format that reads such files."""


class Source(NamedTuple):
    """The files of one entry of `data.datasets`. The columns are sequences that need not be lists, see `rows`."""

    paths: Sequence[str]
    labels: Sequence[int]
    """`NO_LABEL` where a file has none."""
    cumulative_durations: Rows[float] | None = None
    """Seconds of each file and all before it; None where they are not known."""


def read_source(entry: str, suffixes: frozenset[str], options: StorageConfig = DEFAULT_STORAGE) -> Source:
    """Return the files of a folder (searched recursively), a list (`path label` per line), an index, or a single file.

    Args:
        entry: Path or address of the folder, list, index (see `index_file`) or file.
        suffixes: Lowercase suffixes of the files to find.
        options: How remote files are read.

    Raises:
        ConfigError: There are no such files, a line of a list is invalid, or files of a list do not exist.
    """
    if is_remote(entry):
        return _read_remote(entry, suffixes, options)
    path = Path(storage.local_path(entry))
    if path.is_dir():
        paths = Strings(_files_below(path, suffixes))
        if not len(paths):
            raise ConfigError(
                f"data.datasets: '{entry}': no file of a known type in this folder or below ({_joined(suffixes)})"
                f"{_other_format(_files_below(path, OTHER_FORMATS), suffixes)}"
            )
        return Source(paths, Numbers(np.full(len(paths), NO_LABEL, np.int32)))
    if not path.exists():
        raise ConfigError(f"data.datasets: '{entry}': no such folder, list or file (looked in {Path.cwd()})")
    if path.suffix.lower() in LIST_SUFFIXES:
        return read_list(path)
    if path.suffix.lower() == INDEX_SUFFIX:
        index = open_index(path)
        return Source(index.paths, index.labels, index.cumulative_durations)
    if path.suffix.lower() in suffixes:
        return Source([str(path)], [NO_LABEL])
    raise ConfigError(
        f"data.datasets: '{entry}': neither a folder, nor a list ({_joined(LIST_SUFFIXES)}), "
        f"an index ({INDEX_SUFFIX}), nor one of {_joined(suffixes)}{_other_format([entry], suffixes)}"
    )


def read_list(path: Path) -> Source:
    """Open a list in V-JEPA's format. Relative paths are relative to the list's folder or to the working directory.

    Some of its lines are checked now, each one when it is used; see `ListEntries`.
    """
    entries = ListEntries(path)
    return Source(ListPaths(entries), ListLabels(entries))


def _read_remote(entry: str, suffixes: frozenset[str], options: StorageConfig) -> Source:
    """As `read_source`; whether an address is that of a folder, its suffix tells."""
    suffix = storage.suffix(entry)
    try:
        if suffix in LIST_SUFFIXES:
            return _parse_remote_list(entry, storage.read_file(entry, options))
        if suffix in suffixes:
            return Source([entry], [NO_LABEL])
        if suffix in OTHER_FORMATS:
            raise ConfigError(
                f"data.datasets: '{public(entry)}': not one of {_joined(suffixes)}{_other_format([entry], suffixes)}"
            )
        paths = [p for p in storage.files_below(entry, options) if storage.suffix(p) in suffixes]
    except OSError as error:
        raise ConfigError(f"data.datasets: '{public(entry)}': {storage.reason(error)}") from None
    if not paths:
        raise ConfigError(
            f"data.datasets: '{public(entry)}': no file of a known type in this folder or below ({_joined(suffixes)})"
        )
    return Source(Strings(paths), Numbers(np.full(len(paths), NO_LABEL, np.int32)))


def _parse_remote_list(path: str, content: bytes) -> Source:
    lines = content.decode("utf-8-sig", errors="surrogateescape").splitlines()
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ConfigError(f"data.datasets: {public(path)}: the list is empty; it needs one line `path label` per video")
    entries = [parse_line(line) for _, line in numbered]
    labels = [label for _, label in entries]
    if NO_LABEL in labels and max(labels) != NO_LABEL:
        number, line = numbered[labels.index(NO_LABEL)]
        raise ConfigError(
            f"data.datasets: {public(path)}, line {number}: '{public(line)}' does not end in a label like the other "
            "lines; a label is an integer from 0, after the path and a space, comma or tab"
        )
    folder = os.path.dirname(path)
    return Source(Strings(storage.join(folder, name) for name, _ in entries), Numbers(np.array(labels, np.int64)))


def write_list(path: Path, videos: Iterable[Path], labels: Sequence[int] | None = None) -> None:
    """Write a list that `read_list` reads, with absolute paths, and the label of each video unless `labels` is None."""
    quoted = ['"{}"'.format(str(video.absolute()).replace('"', '""')) for video in videos]
    if labels is not None:
        quoted = [f"{video}\t{label}" for video, label in zip(quoted, labels, strict=True)]
    path.write_text("".join(f"{line}\n" for line in quoted), encoding="utf-8", errors="surrogateescape")


def read_table(path: Path, columns: Iterable[str], dataset: str) -> list[dict[str, str]]:
    """Read the rows of a CSV file by column.

    Args:
        path: The file.
        columns: Columns that it needs to have.
        dataset: Name of the data set, for messages.

    Raises:
        ConfigError: There is no such file, or a column is missing.
    """
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give the folder of {dataset} that contains {path.name}")
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if missing := set(columns) - set(reader.fieldnames or ()):
            raise ConfigError(f"{path} has no column {', '.join(sorted(missing))}; it is not the table of {dataset}")
        return list(reader)


def _files_below(folder: Path, suffixes: Iterable[str]) -> Iterable[str]:
    """Yield paths in sorted order. Hidden files and folders are skipped; links are followed, but never into a cycle."""
    seen = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield os.path.join(parent, name)


def _other_format(paths: Iterable[str], suffixes: frozenset[str]) -> str:
    """Return a hint at the format that reads one of `paths`; empty if there is none, or if no videos are wanted."""
    for path in paths:
        suffix = storage.suffix(path)
        if suffix in OTHER_FORMATS and suffixes >= VIDEO_SUFFIXES:
            return f"; data.format={OTHER_FORMATS[suffix]} reads {suffix}"
    return ""


def _joined(suffixes: Iterable[str]) -> str:
    return " ".join(sorted(suffixes))
