"""Folders, lists and files named in the configuration, into paths with labels; what is wrong is said at once."""

import os
import re
from collections.abc import Iterable
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
MAX_CHECKED = 100_000  # files of a list looked up before training; more would take minutes on a network drive

# `path label`, `path,label`, `path<tab>label`; the path may stand in quotes, and "" within double quotes is a quote.
_PATH = r"""(?:"(?P<double>(?:[^"]|"")*)"|'(?P<single>[^']*)'|(?P<bare>.+?))"""
_LABELLED = re.compile(_PATH + r"(?:\s*[,\t]\s*|\s+)(?P<label>\d+)")
_UNLABELLED = re.compile(_PATH)


class Source(NamedTuple):
    """The files of one entry of `data.datasets`. labels: NO_LABEL where there is none."""

    paths: list[str]
    labels: list[int]


def read_source(entry: str, suffixes: frozenset[str]) -> Source:
    """Files of a folder (searched recursively), of a list (`path label` a line) or the one file `entry`.

    Raises ConfigError when nothing is there, a list cannot be understood, or files of a list are missing.
    """
    path = Path(entry).expanduser()
    if path.is_dir():
        paths = list(_files_below(path, suffixes))
        if not paths:
            raise ConfigError(
                f"data.datasets: '{entry}': no file of a known kind in this folder or below ({_kinds(suffixes)})"
            )
        return Source(paths, [NO_LABEL] * len(paths))
    if not path.exists():
        raise ConfigError(f"data.datasets: '{entry}': no such folder, list or file (looked in {Path.cwd()})")
    if path.suffix.lower() in LIST_SUFFIXES:
        return read_list(path)
    if path.suffix.lower() in suffixes:
        return Source([str(path)], [NO_LABEL])
    raise ConfigError(
        f"data.datasets: '{entry}': neither a folder, nor a list ({_kinds(LIST_SUFFIXES)}), "
        f"nor one of {_kinds(suffixes)}"
    )


def read_list(path: Path) -> Source:
    """A list in V-JEPA's form. Relative paths are looked for beside the list, then in the working directory."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ConfigError(f"data.datasets: {path}: {error.strerror}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise ConfigError(f"data.datasets: {path}: the list is empty; it needs a line `path label` for each video")
    entries = [parse_line(line) for _, line in numbered]
    labels = [label for _, label in entries]
    if NO_LABEL in labels and max(labels) != NO_LABEL:
        number, line = numbered[labels.index(NO_LABEL)]
        raise ConfigError(
            f"data.datasets: {path}, line {number}: '{line}' does not end in a label like the other lines; "
            "a label is a whole number from 0, after the path and a space, comma or tab"
        )
    paths = [_located(Path(name).expanduser(), path.parent) for name, _ in entries]
    _check_files_exist(path, paths, [number for number, _ in numbered])
    return Source(paths, labels)


def parse_line(line: str) -> tuple[str, int]:
    """(path, label) of a line of a list; NO_LABEL when it does not end in a whole number."""
    labelled = _LABELLED.fullmatch(line)
    match = labelled or _UNLABELLED.fullmatch(line)
    if match["double"] is not None:
        name = match["double"].replace('""', '"')
    else:
        name = match["single"] if match["single"] is not None else match["bare"]
    return name, int(labelled["label"]) if labelled else NO_LABEL


def _located(name: Path, folder: Path) -> str:
    beside = folder / name  # an absolute name stays itself
    return str(beside if beside.exists() else name)


def _check_files_exist(path: Path, paths: list[str], numbers: list[int]) -> None:
    checked = np.unique(np.linspace(0, len(paths) - 1, min(len(paths), MAX_CHECKED)).astype(int))
    missing = [i for i in checked if not os.path.exists(paths[i])]
    if missing:
        examples = "".join(f"\n  line {numbers[i]}: {paths[i]}" for i in missing[:5])
        raise ConfigError(
            f"data.datasets: {path}: {len(missing)} of {len(checked)} files looked up do not exist; "
            f"correct the list or remove these lines:{examples}"
        )


def _files_below(folder: Path, suffixes: Iterable[str]) -> Iterable[str]:
    """Paths in sorted order; hidden files and folders are passed over, links are followed, circles of links are not."""
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


def _kinds(suffixes: Iterable[str]) -> str:
    return " ".join(sorted(suffixes))
