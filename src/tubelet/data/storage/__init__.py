"""Local and remote files behind one interface: paths, `file://` addresses, and those that fsspec reads.

Remote files are read in ranges, so that a clip of a long video does not download all of it. A remote file that cannot
be read is a `StorageError`, which decoders report like a damaged file.
"""

import errno
import os
from urllib.parse import unquote, urlsplit

from tubelet.config.addresses import has_credentials, is_remote, public
from tubelet.data.storage import requests
from tubelet.data.storage.files import LocalPart, PartOfFile, RemotePart
from tubelet.data.storage.options import DEFAULT_STORAGE, StorageConfig
from tubelet.data.storage.requests import Status, StorageError

__all__ = [
    "DEFAULT_STORAGE",
    "LocalPart",
    "PartOfFile",
    "RemotePart",
    "Status",
    "StorageConfig",
    "StorageError",
    "files_below",
    "has_credentials",
    "is_remote",
    "join",
    "local_path",
    "open_part",
    "public",
    "read_file",
    "reason",
    "status",
    "suffix",
]


def local_path(path: str) -> str:
    """Return the path of a `file://` address, with `~` expanded; other paths and addresses unchanged."""
    if path.lower().startswith("file://"):
        return unquote(urlsplit(path).path)
    return path if is_remote(path) else os.path.expanduser(path)


def join(folder: str, name: str) -> str:
    """Return the path of `name`, which may be absolute or an address, in a local or remote folder."""
    if is_remote(name) or name.lower().startswith("file://"):
        return local_path(name)
    if not is_remote(folder):
        return os.path.join(local_path(folder), name)
    if name.startswith("/"):
        return name
    if folder.lower().startswith("http"):
        name = name.replace("#", "%23")  # part of the name, not a fragment
    return f"{folder.rstrip('/')}/{name}"


def suffix(path: str) -> str:
    """Return the suffix of a file, such as `.mp4`, in lowercase; that of a URL is not in its query."""
    return os.path.splitext(public(path).removesuffix("?…").rstrip("/"))[1].lower()


def status(path: str, options: StorageConfig) -> Status:
    """Return size and version of a file.

    Raises:
        OSError: There is no such file, or it cannot be reached. The text has the reason, see `reason`.
    """
    if is_remote(path):
        return requests.status(path, options)
    local = os.stat(local_path(path))
    return Status(local.st_size, str(local.st_mtime_ns))


def open_part(path: str, options: StorageConfig, start: int = 0, size: int | None = None) -> PartOfFile:
    """Open a file, or `size` bytes of it from `start` on. Raises OSError."""
    if size is None:
        size = status(path, options).size - start
    if is_remote(path):
        return RemotePart(path, start, size, options)
    return LocalPart(local_path(path), start, size)


def read_file(path: str, options: StorageConfig) -> bytes:
    """Return the content of a small file. Raises OSError."""
    if is_remote(path):
        return requests.read_file(path, options)
    with open(local_path(path), "rb") as file:
        return file.read()


def files_below(folder: str, options: StorageConfig) -> list[str]:
    """Return the files below a remote folder, sorted, without hidden files and folders. Raises OSError."""
    prefix = folder.rstrip("/") + "/"
    found = requests.find(prefix, options)
    if not found:
        raise FileNotFoundError(errno.ENOENT, "there is nothing in this folder")
    return [path for path in found if not any(part.startswith(".") for part in path[len(prefix) :].split("/"))]


def reason(error: OSError) -> str:
    """Return why a file cannot be read, without its name."""
    return error.strerror or str(error)
