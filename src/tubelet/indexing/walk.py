"""The files of folders and lists, as sorted paths."""

import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tubelet.config import ConfigError
from tubelet.config.addresses import is_remote, public
from tubelet.data.sources import NO_LABEL, VIDEO_SUFFIXES, check_whole_files, read_source

logger = logging.getLogger(__name__)

THREADS = 16
"""Folders that are read at the same time: a network drive answers many requests as fast as one."""


def find_files(entries: Iterable[str]) -> list[tuple[str, int]]:
    """Return absolute path and label (-1: none) of each file of folders, lists, indexes and files, sorted, each once.

    Raises:
        ConfigError: An entry does not exist, has no files or remote ones, or a file has two labels.
    """
    found: dict[str, int] = {}
    for entry in entries:
        folder = Path(entry).expanduser()
        if folder.is_dir() and (below := files_below(folder.absolute(), VIDEO_SUFFIXES)):
            found = dict.fromkeys(below, NO_LABEL) | found  # a list may have named some of them with their labels
        else:
            if is_remote(entry):
                raise ConfigError(f"data.datasets: '{public(entry)}': an index is of local files; copy or mount these")
            source = read_source(entry, VIDEO_SUFFIXES)
            check_whole_files(entry, source, "an index")
            for path, label in zip(source.paths, source.labels, strict=True):
                if is_remote(path):
                    raise ConfigError(f"data.datasets: '{entry}' names {public(path)}; an index is of local files")
                path = os.path.abspath(path)
                if label != NO_LABEL and found.get(path, NO_LABEL) not in (NO_LABEL, label):
                    raise ConfigError(
                        f"data.datasets: {path} has the labels {found[path]} and {label}; correct the lists"
                    )
                if label != NO_LABEL or path not in found:
                    found[path] = label
    return sorted(found.items())


def files_below(folder: Path, suffixes: frozenset[str]) -> list[str]:
    """Return the files with these suffixes, hidden ones left out. Links are followed, but no folder is read twice."""
    files: list[str] = []
    seen: set[tuple[int, int]] = set()
    level = [str(folder)]
    with ThreadPoolExecutor(THREADS) as pool:
        while level:  # level by level, so that which of several links to a folder is followed does not depend on time
            below = []
            for identity, folders, names in pool.map(lambda path: _read_folder(path, suffixes), level):
                if identity is not None and identity not in seen:
                    seen.add(identity)
                    below += folders
                    files += names
            level = sorted(below)
    return files


def _read_folder(path: str, suffixes: frozenset[str]) -> tuple[tuple[int, int] | None, list[str], list[str]]:
    """Return device and inode of a folder (None: it cannot be read), its folders, and its files with these suffixes."""
    folders: list[str] = []
    names: list[str] = []
    try:
        status = os.stat(path)
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    folders.append(entry.path)
                elif os.path.splitext(entry.name)[1].lower() in suffixes:
                    names.append(entry.path)
    except OSError as error:
        logger.warning("left out the folder %s: %s", path, error.strerror)
        return None, [], []
    return (status.st_dev, status.st_ino), folders, names
