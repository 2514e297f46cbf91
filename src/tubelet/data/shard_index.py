"""Where the samples of WebDataset tar shards are, so that they are read in any order.

An index is made once per shard by reading the tar headers only, not the videos, and is kept as arrays: there is no
Python object for each sample. It is found beside the shard, as `app.pack` writes it (`name.tar.index`), or in the
user's cache.
"""

import hashlib
import io
import json
import os
import random
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tubelet.config import ConfigError, UserError
from tubelet.config.addresses import public
from tubelet.data import storage
from tubelet.data.storage import Status, StorageConfig
from tubelet.runtime.files import cache_folder, write_atomic
from tubelet.runtime.progress import progress

VERSION = "1"
SIDECAR = ".index"
NO_LABEL = -1
THREADS = 16
"""Shards that are looked up or indexed at the same time; this is waiting for storage."""
HEADER_BLOCK = 64 << 10
"""Bytes of a request for tar headers: also has the labels and texts beside them."""

# As in WebDataset: the key ends at the first dot of the file's name.
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_META = re.compile(r"__[^/]*__($|/)")


class ShardError(UserError):
    """A shard that cannot be indexed. The message names it."""


class ShardIndex(NamedTuple):
    """The samples of a shard, in their order.

    Attributes:
        keys: uint8, the keys, each followed by a zero byte.
        key_ends: int64 [n], where each key ends.
        labels: int64 [n], `NO_LABEL` where a sample has none.
        first: int64 [n + 1], the first member of each sample.
        suffixes: uint16 [m], index in `names` of each member's suffix.
        offsets: int64 [m], where each member's content starts in the shard.
        sizes: int64 [m], its length.
        names: All suffixes, such as `mp4`.
    """

    keys: np.ndarray
    key_ends: np.ndarray
    labels: np.ndarray
    first: np.ndarray
    suffixes: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    names: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def key(self, sample: int) -> str:
        start = int(self.key_ends[sample - 1]) + 1 if sample else 0
        return self.keys[start : int(self.key_ends[sample])].tobytes().decode("utf-8", "surrogateescape")

    def member_with(self, accepts: Callable[[str], bool]) -> np.ndarray:
        """Return the first member of each sample whose suffix is accepted, int64 [n]; -1 where there is none."""
        accepted = np.array([accepts(name) for name in self.names], dtype=bool)[self.suffixes]
        members = np.flatnonzero(accepted)
        found = np.searchsorted(members, self.first[:-1])
        candidates = np.append(members, np.iinfo(np.int64).max)[found]
        return np.where(candidates < self.first[1:], candidates, -1)


def index_shards(paths: list[str], label: str | None, options: StorageConfig) -> list[ShardIndex]:
    """Return the indexes of shards.

    Args:
        paths: Paths or addresses.
        label: Where the labels are: the suffix of a file with an integer (`cls`), `json.<field>`, or None.
        options: How remote files are read.

    Raises:
        ConfigError: Shards cannot be read.
    """
    with ThreadPoolExecutor(min(THREADS, len(paths))) as threads:
        known = list(threads.map(lambda path: _caught(_stored, path, label, options), paths))
        missing = [i for i, index in enumerate(known) if index is None]
        random.SystemRandom().shuffle(missing)  # so that processes that start together share the work
        if missing:
            made = threads.map(lambda i: _caught(_make, paths[i], label, options), missing)
            for i, index in zip(missing, progress(made, desc="indexing shards", total=len(missing)), strict=True):
                known[i] = index
    errors = [str(index) for index in known if isinstance(index, Exception)]
    if errors:
        listed = "".join(f"\n  {error}" for error in errors[:10])
        raise ConfigError(
            f"data.datasets: {len(errors)} of {len(paths)} shards cannot be used; repair or leave them out:{listed}"
        )
    return [index for index in known if isinstance(index, ShardIndex)]


def scan(path: str, label: str | None, options: StorageConfig, size: int | None = None) -> ShardIndex:
    """Return the index of a shard from its headers.

    Raises:
        OSError, tarfile.TarError: It cannot be read, or is no complete, uncompressed tar file.
        ShardError: A sample has two members of the same name, or a label is no integer.
    """
    headers = options.model_copy(update={"block_size": HEADER_BLOCK, "whole_file": HEADER_BLOCK})
    suffix, _, field = (label or "").partition(".")
    keys: list[str] = []
    first: list[int] = []
    labels: list[int] = []
    names: dict[str, int] = {}
    members: list[tuple[int, int, int]] = []
    with storage.open_part(path, headers, 0, size) as file:
        for name, offset, length in _members(file):
            match = _NAME.fullmatch(name)
            if match is None:
                continue
            key, extension = match[1], match[2].lower()
            if not keys or key != keys[-1]:
                keys.append(key)
                first.append(len(members))
                labels.append(NO_LABEL)
            number = names.setdefault(extension, len(names))
            if any(member[0] == number for member in members[first[-1] :]):
                raise ShardError(f"the key {key} has two files .{extension}")
            members.append((number, offset, length))
            if label is not None and extension == suffix:
                file.seek(offset)
                labels[-1] = _parse_label(file.read(length), field, key)
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    table = np.array(members, dtype=np.int64).reshape(-1, 3)
    return ShardIndex(
        np.frombuffer(b"".join(key + b"\0" for key in encoded), dtype=np.uint8),
        np.cumsum([len(key) + 1 for key in encoded], dtype=np.int64) - 1,
        np.array(labels, dtype=np.int64),
        np.array([*first, len(members)], dtype=np.int64),
        table[:, 0].astype(np.uint16),
        table[:, 1].copy(),
        table[:, 2].copy(),
        list(names),
    )


def dump(index: ShardIndex, size: int, label: str | None) -> bytes:
    """Return an index as the content of a file, for a shard of `size` bytes."""
    about = {"version": VERSION, "size": size, "label": label, "names": index.names}
    arrays = {name: np.ascontiguousarray(getattr(index, name)) for name in ShardIndex._fields if name != "names"}
    return save(arrays, {"shard": json.dumps(about)})


def parse(content: bytes, size: int, label: str | None) -> ShardIndex | None:
    """Return the index in `content`; None if it is that of another version, another shard or other labels."""
    try:
        arrays = load(content)
        about = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["shard"])
    except (SafetensorError, KeyError, ValueError):
        return None
    if (about["version"], about["size"], about["label"]) != (VERSION, size, label):
        return None
    return ShardIndex(**arrays, names=about["names"])


def _members(file: io.RawIOBase) -> Iterator[tuple[str, int, int]]:
    """Yield name, offset and size of the files in a tar file, without those that WebDataset skips."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep an object for each
            if member.isreg() and not _META.match(member.name):
                if member.issparse():
                    raise tarfile.ReadError(f"{member.name} is stored as a sparse file")
                yield member.name, member.offset_data, member.size
        file.seek(tar.offset)
        end = file.read(tarfile.BLOCKSIZE)
        # tarfile takes a damaged header for the end of the archive, and does not need the zeros there, without which
        # an archive that was cut off between two files looks complete.
        if not end or end.strip(b"\0"):
            raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset}")


def _parse_label(content: bytes, field: str, key: str) -> int:
    try:
        value = json.loads(content)[field] if field else content.decode().strip()
        return NO_LABEL if value is None else int(np.int64(int(value)))
    except (ValueError, KeyError, TypeError, OverflowError):
        where = f"the field {field} of the json file" if field else "the file"
        raise ShardError(f"the label of {key}, {where}, is no integer") from None


def _caught(function: Callable, path: str, *arguments) -> ShardIndex | Exception | None:
    """Call a function; return its error, with the name of the shard."""
    try:
        return function(path, *arguments)
    except (OSError, tarfile.TarError, ShardError) as error:
        if isinstance(error, tarfile.ReadError) and path.endswith(("gz", "bz2", "xz", "zst")):
            error = ShardError("it is compressed; random access needs an uncompressed .tar")
        return ShardError(f"{public(path)}: {storage.reason(error) if isinstance(error, OSError) else error}")


def _stored(path: str, label: str | None, options: StorageConfig) -> ShardIndex | None:
    """Return the index that is in the cache or beside the shard, None if there is none."""
    status = storage.status(path, options)
    cached = _cache_file(path, status, label)
    if cached.is_file() and (index := parse(cached.read_bytes(), status.size, label)) is not None:
        return index
    try:
        # Shards are padded, so that one that was written again with other labels often has the same size.
        if not storage.is_remote(path) and os.stat(path + SIDECAR).st_mtime_ns < os.stat(path).st_mtime_ns:
            return None
        return parse(storage.read_file(path + SIDECAR, options), status.size, label)
    except OSError:  # also where the server forbids to ask for what does not exist
        return None


def _make(path: str, label: str | None, options: StorageConfig) -> ShardIndex:
    status = storage.status(path, options)
    cached = _cache_file(path, status, label)
    if cached.is_file() and (found := parse(cached.read_bytes(), status.size, label)) is not None:
        return found  # of another process, meanwhile
    index = scan(path, label, options, status.size)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(cached, dump(index, status.size, label))
    return index


def _cache_file(path: str, status: Status, label: str | None) -> Path:
    name = public(path) if storage.is_remote(path) else os.path.abspath(path)
    identity = f"{VERSION}|{name}|{status.size}|{status.version}|{label}"
    digest = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder() / "shards" / digest[:2] / f"{digest}.index"
