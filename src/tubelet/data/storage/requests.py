"""Requests to object stores and web servers through fsspec: repeated where that helps, never without a time limit.

fsspec, and not obstore: a loader's workers are forks of a process that has read lists and folders already. The runtime
of obstore does not survive a fork, while fsspec gives the child new clients. So a file system is looked up for every
request, and never kept.
"""

import asyncio
import concurrent.futures
import functools
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from tubelet.config import ConfigError
from tubelet.config.addresses import public, public_text
from tubelet.data.storage.options import StorageConfig

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

CLIENTS = {
    **{"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"},
    **{"hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"},
}
"""Scheme -> the package of its client."""
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
SIZE_NAMES = ("size", "Size")
VERSION_NAMES = ("ETag", "etag", "md5Hash", "blob_id", "xet_hash", "Last-Modified", "mtime")

_jitter = random.SystemRandom()  # has no seed, so that nothing that is drawn for training can depend on it


class StorageError(OSError):
    """A request has failed for good. The message has the reason, and neither the address nor credentials."""


class Truncated(Exception):
    """An answer is shorter than what was requested."""


class Status(NamedTuple):
    """Size of a file in bytes, and its ETag or another text that changes with its content."""

    size: int
    version: str


def read_range(path: str, start: int, stop: int, options: StorageConfig) -> bytes:
    """Return bytes `start` to `stop` - 1 of a remote file.

    Raises:
        StorageError: They cannot be read.
    """

    def read(call: "Call") -> bytes:
        content = call("cat_file", _name(path), start=start, end=stop)
        if len(content) > stop - start:
            raise StorageError("the server ignores ranges and sends the whole file; use a server that supports them")
        if len(content) < stop - start:
            raise Truncated(f"{len(content)} of {stop - start} bytes")
        return content

    return _repeated(path, read, options)


def read_file(path: str, options: StorageConfig) -> bytes:
    """Return the content of a small remote file, such as a list."""
    return _repeated(path, lambda call: call("cat_file", _name(path)), options)


def status(path: str, options: StorageConfig) -> Status:
    """Return size and version of a remote file.

    Raises:
        StorageError: There is no such file, or the server does not tell its size.
    """
    info = _repeated(path, lambda call: call("info", _name(path)), options)
    size = next((info[name] for name in SIZE_NAMES if info.get(name) is not None), None)
    if size is None:
        raise StorageError("the server does not tell the size of the file, which reading parts of it needs")
    return Status(int(size), "|".join(str(info[name]) for name in VERSION_NAMES if info.get(name)))


def find(folder: str, options: StorageConfig) -> list[str]:
    """Return the addresses of all files below a remote folder, sorted."""
    scheme = _scheme(folder)
    names = _repeated(folder, lambda call: call("find", _name(folder)), options)
    return sorted(name if "://" in name else f"{scheme}://{name}" for name in names)


class Call:
    """Calls methods of the file system of a path, each within the time limit of an attempt."""

    def __init__(self, path: str, timeout: float):
        self._files, self._timeout = _file_system(path), timeout

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self._files, "async_impl", False):  # hf://, whose client has time limits of its own
            if method == "cat_file":
                kwargs["cache_type"] = "none"  # the client would read ahead
            return getattr(self._files, method)(*args, **kwargs)
        coroutine = getattr(self._files, f"_{method}")(*args, **kwargs)
        future = asyncio.run_coroutine_threadsafe(coroutine, self._files.loop)
        try:
            return future.result(self._timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise


def _repeated(path: str, function: Callable[[Call], Result], options: StorageConfig) -> Result:
    """Call `function` until it succeeds, fails permanently, or has failed `options.retries` + 1 times."""
    for attempt in itertools.count():
        try:
            return function(Call(path, options.timeout))
        except (ConfigError, StorageError):
            raise
        except Exception as error:
            reason, passing = _explain(error, options)
            if not passing or attempt >= options.retries:
                attempts = f", {attempt + 1} attempts" if passing else ""
                # The cause may hold the address with a signature, so it must not be printed with this error.
                raise StorageError(f"{reason}{attempts}") from None
            seconds = min(options.max_backoff, options.backoff * 2**attempt) * _jitter.uniform(0.5, 1)
            logger.debug("%s: %s; next attempt in %.1f s", public(path), reason, seconds)
        time.sleep(seconds)
    raise AssertionError


def _explain(error: Exception, options: StorageConfig) -> tuple[str, bool]:
    """Return why a request failed, and whether another attempt may succeed."""
    causes = list(_causes(error))
    for cause in causes:
        if (code := _http_status(cause)) is not None:
            response = getattr(cause, "response", None)
            name = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
            passing = code in (408, 425, 429) or code >= 500
            return f"HTTP status {code}" + (f" ({name})" if name and str(name) != str(code) else ""), passing
    root = causes[-1]
    if isinstance(root, TimeoutError | concurrent.futures.TimeoutError | asyncio.TimeoutError):
        return f"no answer within {options.timeout:g} s", True
    text = public_text(" ".join(str(root).split()))[:200]
    if isinstance(root, PERMANENT):
        return "no such file" if isinstance(root, FileNotFoundError) else f"{type(root).__name__}: {text}", False
    reason = f"{type(root).__name__}: {text}" if text else type(root).__name__
    # The rest are errors of connections, except those of the program and of missing credentials.
    permanent = isinstance(root, TypeError | ValueError | NotImplementedError) or "Credentials" in type(root).__name__
    return reason, not permanent


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: clients report a server error as a missing file, with the status in the cause."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__


def _http_status(error: BaseException) -> int | None:
    """Return the status in an error of aiohttp, botocore, gcsfs or huggingface_hub."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        code = getattr(error, "status", None) or getattr(response, "status_code", None)
        if type(error).__module__.startswith("gcsfs"):
            code = getattr(error, "code", None)
    return int(code) if isinstance(code, int | str) and str(code).isdigit() and 400 <= int(code) < 600 else None


def _file_system(path: str) -> Any:
    """Return the file system of a path; fsspec keeps one per process and makes another one after a fork."""
    import fsspec

    scheme = _scheme(path)
    try:
        files = fsspec.filesystem(scheme, **_settings(scheme))
    except ImportError as error:
        raise ConfigError(f"{public(path)}: {error}. Run `pip install {CLIENTS[scheme]}`") from None
    if scheme in ("s3", "s3a"):
        files.retries = 1  # of its own, with the same wait for every error
    return files


@functools.lru_cache
def _settings(scheme: str) -> dict[str, Any]:
    """Arguments of a file system: attempts are repeated here only, and URLs are not escaped again."""
    from fsspec.config import conf

    if scheme in ("s3", "s3a"):
        return {"config_kwargs": {"retries": {"max_attempts": 0}, **conf.get("s3", {}).get("config_kwargs", {})}}
    if scheme in ("http", "https"):
        return {"encoded": True, "headers": {"Accept-Encoding": "identity"}}
    return {}


def _scheme(path: str) -> str:
    return path.partition("://")[0].lower()


def _name(path: str) -> str:
    """Return the address as its file system expects it: in URLs, what may not occur in them is escaped."""
    if _scheme(path) not in ("http", "https"):
        return path
    from urllib.parse import quote

    return quote(path, safe="%/:=&?~#+!$,;'@()*[]")
