"""The folders, lists and files of `data.datasets`: read them as paths and labels, and write lists."""

import csv
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tubelet.config import ConfigError

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

NO_LABEL = -1
MAX_CHECKED = 100_000
"""Files of a list whose existence is checked before training; more would take minutes on a network drive."""

# `path label`, `path,label` or `path<tab>label`; the path may be quoted, and "" within double quotes is a quote.
_PATH = r"""(?:"(?P<double>(?:[^"]|"")*)"|'(?P<single>[^']*)'|(?P<bare>.+?))"""
_LABELED = re.compile(_PATH + r"(?:\s*[,\t]\s*|\s+)(?P<label>\d+)")
_UNLABELED = re.compile(_PATH)


class Source(NamedTuple):
    """The files of one entry of `data.datasets` and their labels, `NO_LABEL` where there is none."""

    paths: list[str]
    labels: list[int]


def read_source(entry: str, suffixes: frozenset[str]) -> Source:
    """Return the files of an entry: a folder (searched recursively), a list (`path label` per line) or a single file.

    Args:
        entry: Path of the folder, list or file.
        suffixes: Lowercase suffixes of the files to find.

    Raises:
        ConfigError: There are no such files, a line of a list is invalid, or files of a list do not exist.
    """
    path = Path(entry).expanduser()
    if path.is_dir():
        paths = list(_files_below(path, suffixes))
        if not paths:
            raise ConfigError(
                f"data.datasets: '{entry}': no file of a known type in this folder or below ({_joined(suffixes)})"
            )
        return Source(paths, [NO_LABEL] * len(paths))
    if not path.exists():
        raise ConfigError(f"data.datasets: '{entry}': no such folder, list or file (looked in {Path.cwd()})")
    if path.suffix.lower() in LIST_SUFFIXES:
        return read_list(path)
    if path.suffix.lower() in suffixes:
        return Source([str(path)], [NO_LABEL])
    raise ConfigError(
        f"data.datasets: '{entry}': neither a folder, nor a list ({_joined(LIST_SUFFIXES)}), "
        f"nor one of {_joined(suffixes)}"
    )


def read_list(path: Path) -> Source:
    """Read a list in V-JEPA's format. Relative paths are relative to the list's folder or to the working directory."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ConfigError(f"data.datasets: {path}: {error.strerror}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ConfigError(f"data.datasets: {path}: the list is empty; it needs one line `path label` per video")
    entries = [parse_line(line) for _, line in numbered]
    labels = [label for _, label in entries]
    if NO_LABEL in labels and max(labels) != NO_LABEL:
        number, line = numbered[labels.index(NO_LABEL)]
        raise ConfigError(
            f"data.datasets: {path}, line {number}: '{line}' does not end in a label like the other lines; "
            "a label is an integer from 0, after the path and a space, comma or tab"
        )
    paths = [_resolved(Path(name).expanduser(), path.parent) for name, _ in entries]
    _check_files_exist(path, paths, [number for number, _ in numbered])
    return Source(paths, labels)


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


def parse_line(line: str) -> tuple[str, int]:
    """Parse a line of a list to (path, label); `NO_LABEL` if it does not end in an integer."""
    labeled = _LABELED.fullmatch(line)
    match = labeled or _UNLABELED.fullmatch(line)
    assert match is not None
    if match["double"] is not None:
        name = match["double"].replace('""', '"')
    else:
        name = match["single"] if match["single"] is not None else match["bare"]
    return name, int(labeled["label"]) if labeled else NO_LABEL


def _resolved(name: Path, folder: Path) -> str:
    in_folder = folder / name  # equals `name` where that is absolute
    return str(in_folder if in_folder.exists() else name)


def _check_files_exist(path: Path, paths: list[str], numbers: list[int]) -> None:
    checked = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MAX_CHECKED)).astype(int))
    missing = [i for i in checked if not os.path.exists(paths[i])]
    if missing:
        examples = "".join(f"\n  line {numbers[i]}: {paths[i]}" for i in missing[:5])
        raise ConfigError(
            f"data.datasets: {path}: {len(missing)} of {len(checked)} checked files do not exist; "
            f"correct the list or remove these lines:{examples}"
        )


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


def _joined(suffixes: Iterable[str]) -> str:
    return " ".join(sorted(suffixes))
