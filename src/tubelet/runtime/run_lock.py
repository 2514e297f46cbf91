"""Locks on the folder of a run, so that two processes never write the same run.

A lock is that of `fcntl.lockf` on a file in the folder. The kernel drops it when its process ends, however that ends,
and children do not inherit it. On NFS it holds between hosts where the server has a lock manager; a mount with `nolock`
or `local_lock` keeps it to one host.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from tubelet.config import Config, ConfigError
from tubelet.runtime.files import remove_leftovers

logger = logging.getLogger(__name__)

NAME = ".lock"
SAME_JOB_SECONDS = 120.0
"""A requeued SLURM job waits so long for the lock of its earlier start, which an NFS server keeps for a dead node."""
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Lock:
    """What a program locks.

    Attributes:
        folder: Folder of the run; it is made if it is missing.
        shared: Other processes may hold it, too, if they share it.
        name: Name of the file.
    """

    folder: Path
    shared: bool = False
    name: str = NAME


@runtime_checkable
class SharesFolder(Protocol):
    """Options of a program that several processes may run in one folder at the same time."""

    def run_locks(self) -> Sequence[Lock]: ...


def locks_of(options: Config) -> Sequence[Lock]:
    """Return what a program with these options locks: its folder, unless it says otherwise."""
    if isinstance(options, SharesFolder):
        return options.run_locks()
    folder = getattr(options, "folder", None)
    return [] if folder is None else [Lock(Path(folder))]


@contextlib.contextmanager
def holding(locks: Sequence[Lock]) -> Iterator[None]:
    """Hold the locks. A folder that was made for them and is empty in the end is removed.

    Raises:
        ConfigError: Another process holds one, or a folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for lock in locks:
            stack.enter_context(_holding(lock))
        yield


@contextlib.contextmanager
def _holding(lock: Lock) -> Iterator[None]:
    existed = lock.folder.is_dir()
    path = lock.folder / lock.name
    file = _acquire(lock, path)
    try:
        if lock.name == NAME and not lock.shared:  # nobody else writes here
            remove_leftovers(lock.folder)
        yield
    finally:
        with contextlib.suppress(OSError):  # others share it, or the folder was removed meanwhile
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            if not existed:
                lock.folder.rmdir()
        os.close(file)


def _acquire(lock: Lock, path: Path) -> int:
    until = time.monotonic() + SAME_JOB_SECONDS
    while True:
        file = _open(path)
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if lock.shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read(file)
            if error.errno in _NOT_SUPPORTED:
                logger.warning(
                    "folder: the file system of %s has no locks (%s), so a second start of the run is not noticed. "
                    "Take care that there is none",
                    lock.folder,
                    error.strerror,
                )
                return file
            os.close(file)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise _cannot_write(lock.folder, error) from None
            if not _is_earlier_start(holder) or time.monotonic() > until:
                raise ConfigError(_in_use(lock.folder, holder)) from None
            time.sleep(1)
            continue
        if _is_file_of(path, file):
            _write(lock.folder, file)
            return file
        os.close(file)  # its holder has removed it before it was locked here


def _open(path: Path) -> int:
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _is_file_of(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def _write(folder: Path, file: int) -> None:
    record = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.datetime.now().isoformat(" ", "seconds"),
        "command": shlex.join(sys.argv),
        "job": os.environ.get("SLURM_JOB_ID"),
    }
    content = json.dumps(record).encode()
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, content, 0)
    except OSError as error:
        os.close(file)
        raise _cannot_write(folder, error) from None


def _read(file: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(file, 1 << 16, 0))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _is_earlier_start(holder: dict[str, Any]) -> bool:
    """Whether the holder is an earlier start of this SLURM job, which is ending or has ended with its node."""
    job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return job is not None and restarts > 0 and holder.get("job") == job


def _in_use(folder: Path, holder: dict[str, Any]) -> str:
    remedy = "Wait until it has ended, stop it, or choose another folder=…"
    if not holder:
        return f"folder: {folder} is in use by another process. {remedy}"
    return (
        f"folder: {folder} is in use by process {holder.get('pid')} on {holder.get('host')} since "
        f"{holder.get('since')}: {holder.get('command')}\n{remedy}"
    )


def _cannot_write(folder: Path, error: OSError) -> ConfigError:
    if isinstance(error, FileExistsError | NotADirectoryError):
        return ConfigError(f"folder: {folder}: it, or a part of its path, is not a folder. Choose another folder=…")
    remedy = "make room, or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose"
    return ConfigError(f"folder: {folder} cannot be written ({error.strerror}); {remedy} another folder=…")
