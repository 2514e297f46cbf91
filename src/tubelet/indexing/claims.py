"""Pieces of work that processes of several hosts take from a shared folder, each piece by one of them.

A claim is a file that exists as long as its owner works. One that was not renewed for a while, or whose process on this
host is gone, is taken over. In rare cases two processes do the same work; results are written atomically.
"""

import contextlib
import os
import socket
import time
import uuid
from pathlib import Path

from tubelet.runtime.files import write_once

STALE_SECONDS = 300.0
"""Age at which a claim is taken over. Owners renew theirs after each file, so it has to exceed the time for one."""


class Claim:
    """A claim of this process."""

    def __init__(self, path: Path):
        self._path, self._renewed = path, time.monotonic()

    def renew(self) -> None:
        """Called often by the owner; the file is touched every ten seconds."""
        if time.monotonic() - self._renewed > 10:
            self._renewed = time.monotonic()
            with contextlib.suppress(FileNotFoundError):  # taken over: both do the work
                os.utime(self._path)

    def release(self) -> None:
        self._path.unlink(missing_ok=True)


def claim(path: Path, stale_seconds: float) -> Claim | None:
    """Return a claim of the piece of work that is named by `path`; None where another process has it."""
    if _is_stale(path, stale_seconds):
        taken = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(path, taken)
            taken.unlink()
    try:
        write_once(path, f"{socket.gethostname()} {os.getpid()}")
    except (FileExistsError, FileNotFoundError):  # taken, or the folder is gone because all is done
        return None
    return Claim(path)


def _is_stale(path: Path, seconds: float) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
        host, _, pid = path.read_text(encoding="utf-8").partition(" ")
    except FileNotFoundError:
        return False
    if host == socket.gethostname() and pid.isdigit():
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return age > seconds
