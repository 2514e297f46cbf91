"""Sequences of millions of strings or numbers without a Python object for each.

A Python list of a million paths takes 100 MB, and every worker process copies it page by page, because reading an
object changes its reference count. These sequences make an object when a row is asked for.
"""

import bisect
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from tubelet.config import ConfigError

T = TypeVar("T")
Offsets = np.ndarray
"""int64 [n + 1]: row i is bytes `offsets[i]` to `offsets[i + 1]` - 1 of a buffer or file."""

ROWS_AT_ONCE = 4096
"""Rows for which an iteration reads from a file at once."""


class Rows(Sequence[T], Generic[T]):
    """A read-only sequence that equals any sequence of the same items. Subclasses implement `__len__` and `_row`."""

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._row(i) for i in range(len(self))[index]]
        return self._row(range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"{type(self).__name__}({len(self)} rows: {shown}{', …' if len(self) > 3 else ''})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(list(self), dtype=dtype)

    def _row(self, index: int) -> T:
        """Return row `index`, from 0 to len - 1."""
        raise NotImplementedError


class Strings(Rows[str]):
    """Strings in one block of memory. Names of files that are not UTF-8 are kept as `os.fsdecode` returns them."""

    def __init__(self, strings: Iterable[str]):
        content, lengths = bytearray(), []
        for string in strings:
            encoded = string.encode("utf-8", "surrogateescape")
            content += encoded
            lengths.append(len(encoded))
        self._content = bytes(content)
        self._offsets = offsets_of(np.array(lengths, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _row(self, index: int) -> str:
        return decode(self._content[self._offsets[index] : self._offsets[index + 1]])


class Numbers(Rows[T]):
    """A NumPy array [n] as a sequence of Python numbers; `np.asarray` of it is the array, without a copy."""

    def __init__(self, array: np.ndarray):
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), ROWS_AT_ONCE):
            yield from self._array[start : start + ROWS_AT_ONCE].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self._array if dtype is None else self._array.astype(dtype, copy=False)
        return array.copy() if copy else array

    def _row(self, index: int) -> T:
        return self._array[index].item()


class Mapped(Rows[T]):
    """`function(row)` of each row of a sequence."""

    def __init__(self, function: Callable[[Any], T], rows: Sequence[Any]):
        self._function, self._rows = function, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[T]:
        return map(self._function, self._rows)

    def _row(self, index: int) -> T:
        return self._function(self._rows[index])


class Joined(Rows[T]):
    """Several sequences, one after the other."""

    def __init__(self, parts: Sequence[Rows[T]]):
        self._parts, self._ends = parts, [*itertools.accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[T]:
        return itertools.chain(*self._parts)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate([np.asarray(part, dtype) for part in self._parts])

    def _row(self, index: int) -> T:
        part = bisect.bisect_right(self._ends, index)
        return self._parts[part][index - self._ends[part]]  # counted from the end of the part


def join_strings(parts: Sequence[Sequence[str]]) -> Rows[str]:
    """Return the concatenation; lists of strings are packed."""
    return _join([part if isinstance(part, Rows) else Strings(part) for part in parts])


def join_numbers(parts: Sequence[Sequence[int]]) -> Rows[int]:
    """Return the concatenation; lists of numbers become arrays."""
    return _join([part if isinstance(part, Rows) else Numbers(np.array(part, dtype=np.int64)) for part in parts])


def _join(parts: list[Rows[T]]) -> Rows[T]:
    return parts[0] if len(parts) == 1 else Joined(parts)


class RowFile:
    """A file that is read at any offset, also by several processes at the same time.

    It is read with `pread`, not mapped into memory, so that random access to all of it takes no memory of the process.
    It is pickled by its name.

    Raises:
        ConfigError: On unpickling, where the file has changed.
    """

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._file = open(path, "rb", buffering=0)
        status = os.fstat(self._file.fileno())
        self.size, self.mtime = status.st_size, status.st_mtime_ns

    def read(self, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop` - 1; fewer where the file ends before."""
        content = os.pread(self._file.fileno(), stop - start, start)
        while len(content) < stop - start and (
            more := os.pread(self._file.fileno(), stop - start, start + len(content))
        ):
            content += more[: stop - start - len(content)]
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {"path": os.path.abspath(self.path), "size": self.size, "mtime": self.mtime}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]
        if (self.size, self.mtime) != (state["size"], state["mtime"]):
            raise ConfigError(f"data.datasets: {self.path} was changed while it is in use; start again")


def offsets_of(lengths: np.ndarray) -> Offsets:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def decode(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
