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
from tubelet.data.list_forms import NO_LABEL
from tubelet.data.rows import Mapped, Numbers, Rows, Strings
from tubelet.data.segments import split_segment
from tubelet.data.storage import DEFAULT_STORAGE, StorageConfig, is_remote, public
from tubelet.data.suffixes import IMAGE_SUFFIXES, LIST_SUFFIXES, VIDEO_SUFFIXES
from tubelet.data.text_list import LinesInMemory, ListEntries, ListLabels, ListPaths, TextLines

OTHER_FORMATS = {".tar": "webdataset", **dict.fromkeys(IMAGE_SUFFIXES, "image_dataset")}
"""Suffix -> the data format that reads such files."""


class Source(NamedTuple):
    """The files of one entry of `data.datasets`. The columns are sequences that need not be lists, see `rows`."""

    paths: Sequence[str]
    labels: Sequence[int]
    """`NO_LABEL` where a file has none."""
    cumulative_durations: Rows[float] | None = None
    """Seconds of each file and all before it; None where they are not known."""
    classes: Sequence[str] = ()
    """Names of the classes, where the labels of a list are names: label i is the i-th of them."""


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
    """Open a list, see `list_forms`. Relative paths are relative to the list's folder or to the working directory.

    Some of its lines are checked now, each one when it is used; see `ListEntries`.
    """
    try:
        lines = TextLines(path)
    except OSError as error:
        raise ConfigError(f"data.datasets: {path}: {error.strerror}") from None
    return _source_of(ListEntries(str(path), lines))


def _source_of(entries: ListEntries) -> Source:
    return Source(ListPaths(entries), ListLabels(entries), classes=entries.classes)


def _read_remote(entry: str, suffixes: frozenset[str], options: StorageConfig) -> Source:
    """As `read_source`; whether an address is that of a folder, its suffix tells."""
    suffix = storage.suffix(entry)
    try:
        if suffix in LIST_SUFFIXES:
            return _source_of(ListEntries(entry, LinesInMemory(storage.read_file(entry, options))))
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


def number_classes(entries: Sequence[str], sources: Sequence[Source]) -> tuple[list[str], list[Sequence[int]]]:
    """Return the names of the classes in all of these lists, and the labels of each list as indices of them.

    Raises ConfigError where some of them name classes and others do not.
    """
    if not any(source.classes for source in sources):
        return [], [source.labels for source in sources]
    for entry, source in zip(entries, sources, strict=True):
        if not source.classes:
            raise ConfigError(
                f"data.datasets: '{public(entry)}' does not name classes, as other lists do; name them in all, or give "
                "numbers in all"
            )
    classes = sorted({name for source in sources for name in source.classes})
    return classes, [renumbered(source.labels, source.classes, classes) for source in sources]


def renumbered(labels: Sequence[int], classes: Sequence[str], as_in: Sequence[str]) -> Rows[int]:
    """Return labels, which are indices of `classes`, as indices of another sequence with these names."""
    numbers = {name: number for number, name in enumerate(as_in)}
    return Mapped([numbers[name] for name in classes].__getitem__, labels)


def check_whole_files(entry: str, source: Source, of: str) -> None:
    """Raise ConfigError where a list has what an index or a shard has no place for: parts of videos, or class names."""
    if split_segment(source.paths[0])[1] is not None:
        raise ConfigError(f"data.datasets: '{entry}' has parts of videos; {of} has whole ones. Give training the list")
    if source.classes:
        raise ConfigError(f"data.datasets: '{entry}' has names of classes; {of} has numbers. Number them in the list")


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
            also = ", mixed_dataset images and videos" if suffix in IMAGE_SUFFIXES else ""
            return f"; data.format={OTHER_FORMATS[suffix]} reads {suffix}{also}"
    return ""


def _joined(suffixes: Iterable[str]) -> str:
    return " ".join(sorted(suffixes))
