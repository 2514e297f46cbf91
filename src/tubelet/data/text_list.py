"""Lists of videos in V-JEPA's format, one `path label` per line, read line by line where they are needed."""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tubelet.config import ConfigError
from tubelet.config.addresses import is_remote, public
from tubelet.data import storage
from tubelet.data.rows import ROWS_AT_ONCE, RowFile, Rows, decode

NO_LABEL = -1
MAX_CHECKED = 2000
"""Lines that are checked before training, with the existence of their files; a network drive takes 1 ms for each."""

# `path label`, `path,label` or `path<tab>label`; the path may be quoted, and "" within double quotes is a quote.
_PATH = r"""(?:"(?P<double>(?:[^"]|"")*)"|'(?P<single>[^']*)'|(?P<bare>.+?))"""
_LABELED = re.compile(_PATH + r"(?:\s*[,\t]\s*|\s+)(?P<label>\d{1,9})")  # a label has 32 bits
_UNLABELED = re.compile(_PATH)

_CHUNK = 1 << 24
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[list(b" \t\r\n\v\f")] = True


class TextLines(Rows[str]):
    """The lines of a UTF-8 file that are not blank, without white space around them.

    Only their offsets are in memory, 8 bytes a line.
    """

    def __init__(self, path: Path):
        self.file = RowFile(path)
        self._offsets = self._find_lines()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, len(self))
            start = int(self._offsets[first])
            block = self.file.read(start, int(self._offsets[last]))
            for begin, end in itertools.pairwise((self._offsets[first : last + 1] - start).tolist()):
                yield _first_line(block[begin:end])

    def line_number(self, index: int) -> int:
        """Return the number of line `index` in the file, blank lines counted, from 1."""
        offset, number = int(self._offsets[index]), 1
        for start in range(0, offset, _CHUNK):
            number += self.file.read(start, min(start + _CHUNK, offset)).count(b"\n")
        return number

    def _row(self, index: int) -> str:
        return _first_line(self.file.read(int(self._offsets[index]), int(self._offsets[index + 1])))

    def _find_lines(self) -> np.ndarray:
        """Return where each line that is not blank starts, and the end of the file."""
        first = len(_BYTE_ORDER_MARK) if self.file.read(0, len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
        starts, blank, begins_line = [np.zeros(0, np.int64)], [np.zeros(0, bool)], True
        for offset in range(first, self.file.size, _CHUNK):
            chunk = np.frombuffer(self.file.read(offset, min(offset + _CHUNK, self.file.size)), np.uint8)
            following = np.flatnonzero(chunk == ord("\n")) + 1
            in_chunk = np.concatenate([[0], following] if begins_line else [following]).astype(np.int64)
            begins_line = bool(chunk[-1] == ord("\n"))
            if begins_line:
                in_chunk = in_chunk[:-1]
            starts.append(in_chunk + offset)
            blank.append(_IS_SPACE[chunk[in_chunk]])  # a line that is blank begins with white space; others may, too
        self._offsets = np.concatenate([*starts, [self.file.size]])
        keep = np.ones(len(self._offsets), dtype=bool)
        for index in np.flatnonzero(np.concatenate(blank)).tolist():
            keep[index] = self._row(index) != ""
        return self._offsets[keep]

    def __getstate__(self) -> RowFile:
        return self.file

    def __setstate__(self, file: RowFile) -> None:
        self.file = file
        self._offsets = self._find_lines()


def _first_line(content: bytes) -> str:
    return decode(content.partition(b"\n")[0]).strip()


class ListEntries:
    """The entries of a list. Either all lines end in a label or none does; which, is decided by `MAX_CHECKED` lines.

    Raises:
        ConfigError: The list cannot be read or is empty, one of the checked lines is invalid, or its file does not
            exist.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.lines = TextLines(path)
        except OSError as error:
            raise ConfigError(f"data.datasets: {path}: {error.strerror}") from None
        if not len(self.lines):
            raise ConfigError(f"data.datasets: {path}: the list is empty; it needs one line `path label` per video")
        checked = np.unique(np.linspace(0, len(self) - 1, min(len(self), MAX_CHECKED)).astype(int)).tolist()
        self.labeled = any(parse_line(self.lines[i])[1] != NO_LABEL for i in checked)
        missing = [i for i in checked if not is_remote(file := self.file(i)) and not os.path.exists(file)]
        if missing:
            examples = "".join(f"\n  line {self.lines.line_number(i)}: {self.file(i)}" for i in missing[:5])
            raise ConfigError(
                f"data.datasets: {path}: {len(missing)} of {len(checked)} checked files do not exist; "
                f"correct the list or remove these lines:{examples}"
            )

    def __len__(self) -> int:
        return len(self.lines)

    def file(self, index: int) -> str:
        """Return the path of an entry; a relative one is relative to the list's folder or to the working directory."""
        return self.resolved(self.entry(self.lines[index], index)[0])

    def resolved(self, name: str) -> str:
        name = storage.local_path(name)
        if is_remote(name):
            return name
        path = Path(name)
        in_folder = self.path.parent / path  # equals `path` where that is absolute
        return str(in_folder if path.is_absolute() or in_folder.exists() else path)

    def entry(self, line: str, index: int) -> tuple[str, int]:
        """Return path and label of a line. Raises ConfigError where it has a label and others do not, or reverse."""
        name, label = parse_line(line)
        if (label != NO_LABEL) != self.labeled:
            problem = "does not end in a label like" if self.labeled else "ends in a label, unlike"
            raise ConfigError(
                f"data.datasets: {self.path}, line {self.lines.line_number(index)}: '{public(line)}' {problem} the "
                "other lines; a label is an integer from 0, after the path and a space, comma or tab"
            )
        return name, label


class ListPaths(Rows[str]):
    """The files of a list."""

    def __init__(self, entries: ListEntries):
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        for index, line in enumerate(self._entries.lines):
            yield self._entries.resolved(self._entries.entry(line, index)[0])

    def _row(self, index: int) -> str:
        return self._entries.file(index)


class ListLabels(Rows[int]):
    """The labels of a list, `NO_LABEL` where it has none."""

    def __init__(self, entries: ListEntries):
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        for index, line in enumerate(self._entries.lines):
            yield self._entries.entry(line, index)[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.fromiter(self, dtype or np.int64, len(self))

    def _row(self, index: int) -> int:
        return self._entries.entry(self._entries.lines[index], index)[1]


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
