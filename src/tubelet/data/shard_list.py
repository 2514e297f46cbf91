"""Which shards an entry of a data set names."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from tubelet.config import ConfigError
from tubelet.config.addresses import public
from tubelet.data import storage
from tubelet.data.sources import LIST_SUFFIXES
from tubelet.data.storage import StorageConfig


def expand(entry: str, options: StorageConfig) -> list[str]:
    """Return the shards of an entry of `data.datasets`, see `tubelet.data.webdataset`.

    Raises:
        ConfigError: There are none.
    """
    if storage.suffix(entry) in LIST_SUFFIXES:
        paths = [storage.join(os.path.dirname(entry), path) for path in _lines(entry, options)]
    else:
        paths = [storage.local_path(path) for path in _braces(entry)]
    if len(paths) == 1 and storage.suffix(paths[0]) != ".tar":
        paths = _shards_below(paths[0], options)
    if not paths:
        raise ConfigError(f"data.datasets: '{public(entry)}': no .tar file in this folder or below")
    return paths


def _lines(entry: str, options: StorageConfig) -> list[str]:
    try:
        text = storage.read_file(entry, options).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise ConfigError(f"data.datasets: '{public(entry)}': {storage.reason(error)}") from None
    return [path for line in text.splitlines() if line.strip() for path in _braces(line.strip())]


def _shards_below(folder: str, options: StorageConfig) -> list[str]:
    if not storage.is_remote(folder):
        if not os.path.isdir(folder):
            raise ConfigError(f"data.datasets: '{folder}': no such folder; give one with .tar files, or the shards")
        return [str(path) for path in sorted(Path(folder).rglob("*.tar")) if not path.name.startswith(".")]
    try:
        return [path for path in storage.files_below(folder, options) if path.endswith(".tar")]
    except OSError as error:
        raise ConfigError(f"data.datasets: '{public(folder)}': {storage.reason(error)}") from None


def _braces(pattern: str) -> Iterable[str]:
    """Expand `{000..099}` and `{a,b}` as a shell does, from left to right; nested braces are not expanded."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    low, high, choices = match.groups()
    if choices is not None:
        values = choices.split(",")
    else:
        step = 1 if int(low) <= int(high) else -1
        width = max(len(low), len(high)) if low.startswith("0") or high.startswith("0") else 0
        values = [f"{number:0{width}d}" for number in range(int(low), int(high) + step, step)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [before + value + rest for value in values for rest in _braces(after)]
