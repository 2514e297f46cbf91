"""Which video each worker has open, so that one whose decoder crashes or never returns can be named and passed over."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import torch

PID, INDEX, SINCE = range(3)
NOTHING = -1

MAX_READ_SECONDS = 5  # seconds

_row: torch.Tensor | None = None  # this process's row of the table; None outside workers


class WorkerMonitor:
    """A table in memory that the workers share with the main process: a row for each worker."""

    def __init__(self, num_workers: int):
        self._table = torch.full((num_workers, 3), NOTHING, dtype=torch.float64).share_memory_()

    def join(self, worker: int) -> None:
        """Called in a worker: from now on `reading` writes into its row."""
        global _row
        _row = self._table[worker]
        _row[PID] = os.getpid()

    def stuck(self) -> list[int]:
        """Samples that were being read when this is called and still are after a while: sound ones take less."""
        before = self._table.clone()
        time.sleep(MAX_READ_SECONDS)
        same = (self._table == before).all(dim=1) & (self._table[:, INDEX] != NOTHING)
        return sorted({int(index) for index in self._table[same, INDEX]})

    def kill_workers(self) -> None:
        """At once: one that is stuck in a decoder hears no other signal."""
        for pid in self._table[:, PID].long().tolist():
            if pid != NOTHING:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def reading(index: int) -> Iterator[None]:
    """Notes, in a worker, that it works on sample `index`. A crash leaves the note standing; an exception does not."""
    if _row is not None:
        _row[SINCE], _row[INDEX] = time.monotonic(), index
    try:
        yield
    finally:
        if _row is not None:
            _row[INDEX] = NOTHING
