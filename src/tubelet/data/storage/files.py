"""Binary file objects over a part of a local or remote file, for decoders and readers of archives."""

import io
from collections import OrderedDict

from tubelet.config.addresses import public
from tubelet.data.storage import requests
from tubelet.data.storage.options import StorageConfig
from tubelet.data.storage.requests import StorageError


class PartOfFile(io.RawIOBase):
    """Bytes `start` to `start + size` - 1 of a file, seekable from 0. Subclasses implement `_read_at`.

    Attributes:
        name: Name for messages, without credentials.
    """

    def __init__(self, path: str, start: int, size: int):
        self.name: str = public(path)
        self.start, self.size = start, size
        self._position = 0

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self.size - self._position)
        content = self._read_at(self._position, left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content

    def readinto(self, buffer) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"negative position {position}")
        self._position = position
        return position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def _read_at(self, position: int, size: int) -> bytes:
        """Return `size` bytes from `position` on, which the part has."""
        raise NotImplementedError


class LocalPart(PartOfFile):
    """Part of a local file."""

    def __init__(self, path: str, start: int, size: int):
        super().__init__(path, start, size)
        self._file = open(path, "rb", buffering=0)

    def close(self) -> None:
        self._file.close()
        super().close()

    def _read_at(self, position: int, size: int) -> bytes:
        self._file.seek(self.start + position)
        content = self._file.read(size)
        if len(content) < size:
            raise StorageError(f"the file ends {size - len(content)} bytes early")
        return content


class RemotePart(PartOfFile):
    """Part of a remote file: read in blocks, of which the most recent are kept in memory.

    While blocks are read in order, each request is twice as long as the one before, up to `options.read_ahead`; after a
    jump it is one block again. Once a request has failed for good, all further ones fail at once: FFmpeg tries others.
    """

    def __init__(self, path: str, start: int, size: int, options: StorageConfig):
        super().__init__(path, start, size)
        self._path, self._options = path, options
        self._block = options.block_size if size > options.whole_file else max(1, size)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._next, self._ahead = 0, 1
        self._failed: StorageError | None = None

    def _read_at(self, position: int, size: int) -> bytes:
        if not size:
            return b""
        first, last = position // self._block, (position + size - 1) // self._block
        content = [self._get(number, last) for number in range(first, last + 1)]
        offset = position - first * self._block
        joined = content[0] if first == last else b"".join(content)
        return joined[offset : offset + size]

    def _get(self, number: int, last: int) -> bytes:
        """Return a block; a request for it includes the blocks up to `last`."""
        if number not in self._blocks:
            self._fetch(number, last)
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _fetch(self, number: int, last: int) -> None:
        if self._failed is not None:
            raise self._failed
        longest = max(1, self._options.read_ahead // self._block)
        self._ahead = min(2 * self._ahead, longest) if number == self._next else 1
        stop = number + 1
        while stop not in self._blocks and (stop <= last or stop < number + self._ahead):
            stop += 1
        begin, end = number * self._block, min(stop * self._block, self.size)
        try:
            content = requests.read_range(self._path, self.start + begin, self.start + end, self._options)
        except StorageError as error:
            self._failed = error
            raise
        for offset in range(0, len(content), self._block):
            self._blocks[(begin + offset) // self._block] = content[offset : offset + self._block]
        self._next = stop
        while len(self._blocks) > max(stop - number, self._options.cache_size // self._block):
            self._blocks.popitem(last=False)
