"""Processes that call a function on files, with a time limit for each: a file that hangs or crashes a decoder costs one
process, which is replaced."""

import functools
import multiprocessing
import multiprocessing.connection
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tubelet.runtime.parent import leave_signals_to

Failed = Callable[[str], Any]


class Readers:
    """`processes` processes that compute `function(*task)`.

    Args:
        function: Called in the processes.
        processes: Their number.
        seconds: Time limit of a call.
        failed: `failed(reason)` is the result of a call that took longer or ended its process.

    Example:
        >>> with Readers(describe, 8, 60.0, lambda reason: {"reason": reason}) as readers:
        ...     for task, row in readers.map((path,) for path in paths):
        ...         …
    """

    def __init__(self, function: Callable[..., Any], processes: int, seconds: float, failed: Failed):
        self._start = functools.partial(_Reader, function)
        self._readers = [self._start() for _ in range(processes)]
        self._seconds, self._failed = seconds, failed

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        for reader in self._readers:
            reader.kill()

    def map(self, tasks: Iterable[tuple]) -> Iterator[tuple[tuple, Any]]:
        """Yield each task, a tuple of arguments, with its result, in the order in which they are done."""
        waiting = iter(tasks)
        busy: dict[Any, _Reader] = {}  # by connection
        idle = list(self._readers)
        while True:
            while idle and (task := next(waiting, None)) is not None:
                reader = idle.pop()
                reader.send(task)
                busy[reader.connection] = reader
            if not busy:
                return
            first = min(reader.since for reader in busy.values())
            timeout = max(0.0, first + self._seconds - time.monotonic())
            ready = multiprocessing.connection.wait(list(busy), timeout)
            late = [
                c for c, reader in busy.items() if time.monotonic() - reader.since > self._seconds and c not in ready
            ]
            for connection in [*ready, *late]:
                reader = busy.pop(connection)
                task, result = reader.task, None
                if connection in late:
                    reason = f"took longer than {self._seconds:g} seconds"
                else:
                    try:
                        result, reason = connection.recv(), None
                    except EOFError:
                        reason = reader.death()
                if reason is not None:
                    result, reader = self._failed(reason), self._replace(reader)
                idle.append(reader)
                yield task, result

    def _replace(self, reader: "_Reader") -> "_Reader":
        reader.kill()
        new = self._start()
        self._readers[self._readers.index(reader)] = new
        return new


class _Reader:
    """A process, and the task that it is given. A fork, because importing torch and PyAV takes seconds."""

    def __init__(self, function: Callable[..., Any]):
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.task: tuple = ()
        self.since = 0.0
        self._process = context.Process(target=_serve, args=(function, theirs, self.connection), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, task: tuple) -> None:
        self.task, self.since = task, time.monotonic()
        self.connection.send(task)

    def death(self) -> str:
        """Return how the process ended."""
        self._process.join(1)
        code = self._process.exitcode
        name = signal.Signals(-code).name if code is not None and code < 0 else f"status {code}"
        return f"its reader crashed ({name})"

    def kill(self) -> None:
        self._process.kill()
        self._process.join(1)  # one that waits for a network drive ends only when that answers
        self.connection.close()


def _serve(function: Callable[..., Any], connection: Any, theirs: Any) -> None:
    theirs.close()
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    leave_signals_to(parent.pid)
    while connection in multiprocessing.connection.wait([connection, parent.sentinel]):
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(function(*task))
