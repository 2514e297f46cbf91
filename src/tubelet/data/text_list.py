"""Lists of videos, read line by line where they are needed. For the forms of a line see `list_forms`."""

import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tubelet.config import ConfigError
from tubelet.config.addresses import is_remote, public
from tubelet.data import storage
from tubelet.data.list_forms import EXPECTED, Entry, Form, Table, form_of, parse_line, without_numbers
from tubelet.data.rows import ROWS_AT_ONCE, RowFile, Rows, Strings, decode

MAX_CHECKED = 2000
"""Lines that are checked before training, with the existence of their files; a network drive takes 1 ms for each."""

_CHUNK = 1 << 24
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[list(b" \t\r\n\v\f")] = True


class TextLines(Rows[str]):
    """The lines of a UTF-8 file that are not blank, without ASCII white space around them.

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
    return decode(content.partition(b"\n")[0].strip())


class LinesInMemory(Rows[str]):
    """As `TextLines`, of the content of a file."""

    def __init__(self, content: bytes):
        lines = enumerate(content.removeprefix(_BYTE_ORDER_MARK).split(b"\n"), start=1)
        numbered = [(number, decode(line.strip())) for number, line in lines if line.strip()]
        self._lines, self._numbers = Strings(line for _, line in numbered), [number for number, _ in numbered]

    def __len__(self) -> int:
        return len(self._lines)

    def line_number(self, index: int) -> int:
        """Return the number of line `index` in the file, blank lines counted, from 1."""
        return self._numbers[index]

    def _row(self, index: int) -> str:
        return self._lines[index]


class ListEntries:
    """The entries of a list, all of which have one form; which, is decided by `MAX_CHECKED` lines.

    Args:
        path: Path or address of the list.
        lines: Its lines.

    Attributes:
        classes: Names of the classes, where labels are names: label i is the i-th of them, in alphabetical order.

    Raises:
        ConfigError: The list is empty, one of the checked lines is invalid, or its file does not exist.
    """

    def __init__(self, path: str, lines: TextLines | LinesInMemory):
        self.path, self._lines = path, lines
        if not len(lines):
            raise ConfigError(f"data.datasets: {public(path)}: the list is empty; {EXPECTED}")
        self._check_text(lines[0])
        self._first = int(Table.is_heading(lines[0]))
        if not len(self):
            raise ConfigError(f"data.datasets: {public(path)}: no line below that of the names of the columns")
        checked = np.unique(np.linspace(0, len(self) - 1, min(len(self), MAX_CHECKED)).astype(int)).tolist()
        self._form = self._find_form([self._line(i) for i in checked])
        entries = {i: self.entry(i) for i in checked}
        self._check_files(entries)
        self.classes: list[str] = []
        if isinstance(entries[0].label, str):
            self.classes = sorted({str(entry.label) for entry in self})
        self._number_of = {name: number for number, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._lines) - self._first

    def __iter__(self) -> Iterator[Entry]:
        for index, line in enumerate(itertools.islice(self._lines, self._first, None)):
            yield self._parse(line, index)

    def entry(self, index: int) -> Entry:
        """Return what a line says. Raises ConfigError where its form is not that of the others."""
        return self._parse(self._line(index), index)

    def file(self, entry: Entry) -> str:
        """Return the path of an entry; a relative one is relative to the list's folder or to the working directory."""
        return self._resolved(entry.name) + entry.segment

    def label(self, entry: Entry) -> int:
        """Return the label of an entry, `NO_LABEL` where it has none."""
        return entry.label if isinstance(entry.label, int) else self._number_of[entry.label]

    def _line(self, index: int) -> str:
        return self._lines[index + self._first]

    def _parse(self, line: str, index: int) -> Entry:
        try:
            return self._form.parse(line)
        except ValueError as error:
            raise self._error(line, index + self._first, str(error)) from None

    def _error(self, line: str, number: int, problem: str) -> ConfigError:
        where = f"{public(self.path)}, line {self._lines.line_number(number)}"
        return ConfigError(f"data.datasets: {where}: '{public(line)}' {problem}")

    def _resolved(self, name: str) -> str:
        if is_remote(self.path):
            return storage.join(os.path.dirname(self.path), name)
        name = storage.local_path(name)
        if is_remote(name):
            return name
        path = Path(name)
        in_folder = Path(self.path).parent / path  # equals `path` where that is absolute
        return str(in_folder if path.is_absolute() or in_folder.exists() else path)

    def _check_text(self, line: str) -> None:
        problem = ""
        if "\0" in line or line.startswith(("\udcff\udcfe", "\udcfe\udcff")):
            problem = "the list is not in UTF-8, but in UTF-16 or binary"
        elif "\r" in line:
            problem = "lines of the list end in CR alone"
        if problem:
            raise ConfigError(
                f"data.datasets: {public(self.path)}: {problem}; save it as UTF-8 with a newline per line"
            )

    def _find_form(self, lines: Sequence[str]) -> Form:
        if self._first:
            try:
                table = Table(self._lines[0])
                if not table.is_plain:
                    table.choose(lines)
                    return table
            except ValueError as error:
                raise self._error(self._lines[0], 0, str(error)) from None
        file = self._resolved(parse_line(lines[0])[0])
        return form_of(lines, is_file=not is_remote(file) and os.path.exists(file))

    def _check_files(self, entries: dict[int, Entry]) -> None:
        missing = {
            i: file
            for i, entry in entries.items()
            if not is_remote(file := self._resolved(entry.name)) and not os.path.isfile(file)
        }
        if not missing:
            return
        shown = itertools.islice(missing.items(), 5)
        examples = "".join(f"\n  line {self._lines.line_number(i + self._first)}: {file}" for i, file in shown)
        raise ConfigError(
            f"data.datasets: {public(self.path)}: {len(missing)} of {len(entries)} checked files do not exist; correct "
            f"the list or remove these lines:{examples}{self._hint(entries[next(iter(missing))].name)}"
        )

    def _hint(self, name: str) -> str:
        """Return what the user may have meant with a name that is not that of a file, as a further line."""
        shorter = without_numbers(name)
        for other in filter(None, (name, shorter)):
            if os.path.isdir(self._resolved(other)):
                return f"\n{other} is a folder, as in lists of folders of frames. Lists are of videos; {EXPECTED}"
        if shorter is not None and os.path.isfile(self._resolved(shorter)):
            return f"\nThere is a file {shorter}. If what follows is no part of its name: {EXPECTED}, in seconds"
        for part in re.split(r"""[\s,;|"']+""", name):
            if os.path.isfile(self._resolved(part)):
                return f"\nThere is a file {part}. If the rest is no part of its name: {EXPECTED}"
        return ""


class ListPaths(Rows[str]):
    """The files of a list."""

    def __init__(self, entries: ListEntries):
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return map(self._entries.file, self._entries)

    def _row(self, index: int) -> str:
        return self._entries.file(self._entries.entry(index))


class ListLabels(Rows[int]):
    """The labels of a list, `NO_LABEL` where it has none."""

    def __init__(self, entries: ListEntries):
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[int]:
        return map(self._entries.label, self._entries)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.fromiter(self, dtype or np.int64, len(self))

    def _row(self, index: int) -> int:
        return self._entries.label(self._entries.entry(index))
