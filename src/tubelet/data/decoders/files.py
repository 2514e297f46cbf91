"""Sources of videos: paths, and file-like objects that several readers share."""

import io
import os
from typing import BinaryIO

PathOrFile = str | BinaryIO
"""Path of a file, or a binary file-like object with `read` and `seek`; it is read from its beginning."""


class FileView(io.RawIOBase):
    """A file-like object with a separate read position, so that several readers can use the same underlying object.

    Args:
        file: The underlying object.
        start, content: A part of the file that is in memory already, and where it starts.
    """

    def __init__(self, file: "BinaryIO | FileView", start: int = 0, content: bytes = b""):
        self._file, self._position = file, 0
        self._start, self._content = start, content
        self.name = name_of(file)

    def read(self, size: int = -1) -> bytes:
        offset = self._position - self._start
        if size >= 0 and 0 <= offset < len(self._content):
            content = self._content[offset : offset + size]
        else:
            self._file.seek(self._position)
            content = self._file.read(size)
        self._position += len(content)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            offset, whence = self._position + offset, io.SEEK_SET
        self._position = offset if whence == io.SEEK_SET else self._file.seek(offset, whence)
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def opened(source: PathOrFile) -> BinaryIO | FileView:
    """Return an unbuffered file of a path, or a view of the file-like object; closing it leaves the object open."""
    return open(source, "rb", buffering=0) if isinstance(source, str) else FileView(source)


def readable(source: PathOrFile) -> str | FileView:
    """Return what a decoder can open: the path, or a view of the file-like object."""
    return source if isinstance(source, str) else FileView(source)


def name_of(source: "PathOrFile | FileView") -> str:
    """Return the path, or the `name` of a file-like object if it has one."""
    return source if isinstance(source, str) else str(getattr(source, "name", "(file-like object)"))


def identity(source: PathOrFile) -> tuple[str, int, int] | None:
    """Path, size and modification time; None for file-like objects."""
    if not isinstance(source, str):
        return None
    status = os.stat(source)
    return source, status.st_size, status.st_mtime_ns


def first_line(error: Exception) -> str:
    """Return type and first line of an error of a C++ library, whose other lines are a stack trace."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
