"""A file with a string and some numbers for each of millions of rows, read row by row without loading it.

It is a safetensors file: the bytes of all strings, their offsets, and one array for each column of numbers.
"""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from tubelet.data.rows import ROWS_AT_ONCE, RowFile, Rows, decode, offsets_of

T = TypeVar("T")
N = TypeVar("N", int, float)

HEADER_BYTES = 1024
_STRINGS, _OFFSETS = "strings", "offsets"
_TYPES = {"U8": "|u1", "I32": "<i4", "I64": "<i8", "F64": "<f8"}
_DTYPES: dict[str, np.dtype] = {name: np.dtype(kind) for name, kind in _TYPES.items()}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class RowStoreWriter:
    """Writes a store: first all strings, in any number of parts, then the columns.

    Example:
        >>> with replacing(path) as temporary, open(temporary, "wb") as file:
        ...     writer = RowStoreWriter(file)
        ...     writer.add(b"a.mp4b.mp4", np.array([5, 5]))
        ...     writer.finish({"label": np.array([3, 0], dtype=np.int32)})
    """

    def __init__(self, file: BinaryIO):
        self._file, self._size, self._lengths = file, 0, [np.zeros(0, np.int64)]
        file.write(bytes(HEADER_BYTES))

    def add(self, content: bytes | memoryview, lengths: np.ndarray) -> None:
        """Add strings: their UTF-8 bytes one after the other, and the number of bytes of each."""
        self._file.write(content)
        self._size += len(content)
        self._lengths.append(lengths.astype(np.int64))

    def finish(self, columns: dict[str, np.ndarray]) -> None:
        """Write columns of int32, int64 or float64 with a number for each string."""
        padding = -self._size % 8  # numbers at a multiple of their size
        self._file.write(bytes(padding))
        offsets = offsets_of(np.concatenate(self._lengths))
        header = {_STRINGS: _entry("U8", self._size + padding, 0, self._size + padding)}
        position = self._size + padding
        for name, column in {
            _OFFSETS: offsets,
            **dict(sorted(columns.items(), key=lambda item: -item[1].itemsize)),
        }.items():
            self._file.write(np.ascontiguousarray(column).tobytes())
            header[name] = _entry(_NAMES[column.dtype], len(column), position, position + column.nbytes)
            position += column.nbytes
        text = json.dumps(header).encode()
        assert len(text) <= HEADER_BYTES - 8
        self._file.seek(0)
        self._file.write((HEADER_BYTES - 8).to_bytes(8, "little") + text.ljust(HEADER_BYTES - 8))


class RowStore:
    """An open store."""

    def __init__(self, path: Path):
        self.file = RowFile(path)
        header: dict[str, Any] = json.loads(self.file.read(8, HEADER_BYTES))
        self._columns: dict[str, tuple[np.dtype, int, int]] = {
            name: (_DTYPES[entry["dtype"]], HEADER_BYTES + entry["data_offsets"][0], entry["shape"][0])
            for name, entry in header.items()
        }
        self._maps: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def __len__(self) -> int:
        return self._columns[_OFFSETS][2] - 1

    def __contains__(self, column: str) -> bool:
        return column in self._columns

    def strings(self, folder: str = "") -> "StoredStrings":
        """Return the strings; as paths in `folder` if it is given."""
        return StoredStrings(self, folder)

    def integers(self, column: str) -> "StoredNumbers[int]":
        return StoredNumbers(self, column)

    def floats(self, column: str) -> "StoredNumbers[float]":
        return StoredNumbers(self, column)

    def read(self, column: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` - 1 of a column, or of the bytes of the strings."""
        dtype, offset, _ = self._columns[column]
        return np.frombuffer(self.file.read(offset + start * dtype.itemsize, offset + stop * dtype.itemsize), dtype)

    def map(self, column: str) -> np.ndarray:
        """Return a whole column, mapped into memory."""
        if column not in self._maps:
            dtype, offset, length = self._columns[column]
            self._maps[column] = np.memmap(self.file.path, dtype, "r", offset, (length,))
        return self._maps[column]


class _Stored(Rows[T]):
    """What a store has for each row. Subclasses implement `_read`."""

    def __init__(self, store: RowStore):
        self._store = store

    def __len__(self) -> int:
        return len(self._store)

    def __iter__(self) -> Iterator[T]:
        for first in range(0, len(self), ROWS_AT_ONCE):
            yield from self._read(first, min(first + ROWS_AT_ONCE, len(self)))

    def _row(self, index: int) -> T:
        return self._read(index, index + 1)[0]

    def _read(self, first: int, last: int) -> list[T]:
        """Return rows `first` to `last` - 1."""
        raise NotImplementedError


class StoredStrings(_Stored[str]):
    """The strings of a store."""

    def __init__(self, store: RowStore, folder: str):
        super().__init__(store)
        self._folder = folder

    def _read(self, first: int, last: int) -> list[str]:
        offsets = self._store.read(_OFFSETS, first, last + 1)
        content = self._store.read(_STRINGS, offsets[0], offsets[-1]).tobytes()
        bounds = (offsets - offsets[0]).tolist()
        strings = [decode(content[start:stop]) for start, stop in itertools.pairwise(bounds)]
        return [os.path.join(self._folder, string) for string in strings] if self._folder else strings


class StoredNumbers(_Stored[N]):
    """A column of a store; `np.asarray` of it is mapped into memory."""

    def __init__(self, store: RowStore, column: str):
        super().__init__(store)
        self._column = column

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        column = self._store.map(self._column)
        return np.array(column, dtype=dtype) if copy or dtype not in (None, column.dtype) else column

    def _read(self, first: int, last: int) -> list[N]:
        return self._store.read(self._column, first, last).tolist()


def _entry(dtype: str, length: int, start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [length], "data_offsets": [start, stop]}
