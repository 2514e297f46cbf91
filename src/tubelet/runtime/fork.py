"""`python -m <module>` in a fork of this process, which saves the time to import torch."""

import contextlib
import fcntl
import multiprocessing
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tubelet.runtime.parent import end_with_parent


class AlreadyRunning(Exception):
    """Another process writes to the log."""


class ForkedProgram:
    """Starts `python -m <command>` in its own session, with its output appended to `log`, below the line `$ <title>`.

    Raises:
        AlreadyRunning: A program that was started with this log is still running.
    """

    def __init__(self, command: Sequence[str], log: Path, threads: int, title: str):
        with open(log, "ab") as file:
            # The lock belongs to the open file description: it lasts as long as the child and the child's children.
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise AlreadyRunning from None
            file.write(f"\n$ {title}\n".encode())
            file.flush()
            context = multiprocessing.get_context("fork")
            self._process = context.Process(target=_run, args=(os.getpid(), command, file.fileno(), threads))
            self._process.start()

    @property
    def exitcode(self) -> int | None:
        """None while it runs; negative if it was killed by a signal."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the program and its children."""
        pid = self._process.pid
        assert pid is not None  # __init__ has started it
        try:
            os.killpg(pid, number)
        except ProcessLookupError:  # it has ended, or has not made its session yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float) -> None:
        """Wait until it ends. Kill it if it still runs after so many seconds."""
        self._process.join(seconds)
        if self.exitcode is None:
            self.send_signal(signal.SIGKILL)
            self._process.join()


def _run(parent: int, command: Sequence[str], log: int, threads: int) -> None:
    os.setsid()  # Ctrl-C reaches the parent only, which then ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_parent(parent, signal.SIGTERM)  # also when the parent is killed; the program may save
    for descriptor, source in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(source, descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.environ |= {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)  # it has read the environment already
    sys.path.insert(0, os.getcwd())
    sys.argv = list(command)
    sys.modules.pop(command[0], None)  # else runpy warns that the module is already imported
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)
