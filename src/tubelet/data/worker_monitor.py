"""Which sample each worker is reading, so that a video that crashes or blocks its decoder can be named and skipped."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator

import torch

PID, INDEX, SINCE = range(3)
IDLE = -1

MAX_READ_SECONDS = 5
"""A sample that is still being read after this time counts as hung; intact ones take less."""

_row: torch.Tensor | None = None
"""This worker's row of the table; None in the main process."""


class WorkerMonitor:
    """A table in memory shared with the workers, one row per worker: process id, sample being read, start time."""

    def __init__(self, num_workers: int):
        self._table = torch.full((num_workers, 3), IDLE, dtype=torch.float64).share_memory_()

    def attach(self, worker: int) -> None:
        """Called in a worker process: let `reading` write to its row."""
        global _row
        _row = self._table[worker]
        _row[PID] = os.getpid()

    def hung_samples(self) -> list[int]:
        """Indices of the samples that are being read now and still are after `MAX_READ_SECONDS`."""
        before = self._table.clone()
        time.sleep(MAX_READ_SECONDS)
        unchanged = (self._table == before).all(dim=1) & (self._table[:, INDEX] != IDLE)
        return sorted({int(index) for index in self._table[unchanged, INDEX]})

    def kill_workers(self) -> None:
        """Send SIGKILL: a worker that hangs in a decoder handles no other signal."""
        for pid in self._table[:, PID].long().tolist():
            if pid != IDLE:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def reading(index: int) -> Iterator[None]:
    """Record that this worker reads sample `index`. The record outlives a crash of the process, not an exception."""
    if _row is not None:
        _row[SINCE], _row[INDEX] = time.monotonic(), index
    try:
        yield
    finally:
        if _row is not None:
            _row[INDEX] = IDLE
