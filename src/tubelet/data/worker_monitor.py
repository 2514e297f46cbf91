"""Which sample each worker is reading, so that a video that crashes or blocks its decoder can be named and skipped."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

PID, INDEX, SINCE = range(3)
IDLE = -1

MAX_READ_SECONDS = 5
"""A sample that is still being read after this time counts as hung; intact ones take less."""
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE)
"""Signals with which a decoder dies of a file; others come from outside, SIGBUS from a full /dev/shm."""

_row: torch.Tensor | None = None
"""This worker's row of the table; None in the main process."""


@dataclass(frozen=True)
class Failure:
    """Samples whose decoder crashed a worker, and samples that a worker was reading when it was killed or hung."""

    crashed: set[int]
    suspected: set[int]


class WorkerMonitor:
    """A table in memory shared with the workers, one row per worker: process id, sample being read, start time."""

    def __init__(self, num_workers: int):
        self._table = torch.full((num_workers, 3), IDLE, dtype=torch.float64).share_memory_()
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def attach(self, worker: int) -> None:
        """Called in a worker process: let `reading` write to its row."""
        global _row
        _row = self._table[worker]
        _row[PID] = os.getpid()

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Take the processes that are started in this context as the workers, to know how each of them ends."""
        others = set(multiprocessing.active_children())
        yield
        self._processes = [process for process in multiprocessing.active_children() if process not in others]

    def wait_for_end(self, seconds: float) -> bool:
        """Wait until a worker has been killed or has failed, at most so long; return whether one has."""
        until = time.monotonic() + seconds
        # Not their sentinels: these are connections, too, which close before the exit code is known.
        while not (ended := any(process.exitcode for process in self._processes)) and time.monotonic() < until:
            time.sleep(0.01)
        return ended

    def failure(self) -> Failure | None:
        """What the workers were reading when one ended, or what they are reading for too long; None where they work."""
        failed = {process.pid: process.exitcode for process in self._processes if process.exitcode}
        if failed:
            reading_then = {int(row[PID]): int(row[INDEX]) for row in self._table if row[INDEX] != IDLE}
            crashed = {pid for pid, code in failed.items() if -code in CRASHES}
            return Failure(
                crashed={index for pid, index in reading_then.items() if pid in crashed},
                suspected={index for pid, index in reading_then.items() if pid in failed.keys() - crashed},
            )
        if not self._processes:
            return None
        before = self._table.clone()
        time.sleep(MAX_READ_SECONDS)
        unchanged = (self._table == before).all(dim=1) & (self._table[:, INDEX] != IDLE)
        hung = {int(index) for index in self._table[unchanged, INDEX]}
        return Failure(crashed=set(), suspected=hung) if hung else None

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
