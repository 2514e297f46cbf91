"""Make batches in worker processes, which may crash or hang."""

import ctypes
import functools
import logging
import os
import platform
import shutil
import signal
import threading
from collections.abc import Iterator
from typing import Protocol

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset  # a module with the name `Dataset` would be a data format
from torch.utils.data._utils import signal_handling

from tubelet.config import UserError
from tubelet.data.types import Batch, SampleSource
from tubelet.data.worker_monitor import WorkerMonitor
from tubelet.runtime.parent import SECONDS_TO_END, leave_signals_to

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Restarts of the workers in a row without a batch or the video that is the reason."""
AHEAD = 3
"""Steps by which each worker may be ahead of the last batch: those it has finished (`prefetch_factor`), and one."""
CHECK_SECONDS = 5
"""Seconds without a batch after which the main process looks whether a worker has ended."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


class BatchSource(Protocol):
    """`source[step]` is the batch of a step. A worker makes complete batches, so they keep the order of the steps."""

    dataset: SampleSource

    def __getitem__(self, step: int) -> Batch: ...


class Loader:
    """`source[step]` for each of `steps`, in order, made by worker processes.

    A video that crashes a worker is added to `source.dataset.unreadable`, and the batches are made again without it. A
    video that blocks its worker for `timeout` seconds, or whose worker is killed, is tried once more before: that may
    have had other reasons, such as little memory.
    """

    def __init__(self, source: BatchSource, steps: range, num_workers: int, pin_memory: bool, timeout: int):
        self.source, self.steps = source, steps
        self.num_workers, self.pin_memory, self.timeout = num_workers, pin_memory, timeout

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        done = restarts = 0
        read_again_by: dict[int, int] = {}  # suspected sample -> step
        while done < len(self.steps):
            try:
                monitor = WorkerMonitor(self.num_workers)
            except RuntimeError as error:
                raise _explain_memory(error) from None
            batches = self._batches(self.steps[done:], monitor)
            try:
                while (batch := self._next(batches, monitor)) is not None:
                    if isinstance(batch, UserError):
                        # The error's traceback keeps this frame alive, and with it the workers.
                        monitor.kill_workers()
                        raise batch
                    done, restarts = done + 1, 0
                    yield batch
            except RuntimeError as error:
                failure = monitor.failure()
                monitor.kill_workers()
                if failure is None or restarts == MAX_RESTARTS:
                    raise _explain_memory(error) from None
                repeated = {sample for sample in failure.suspected if done <= read_again_by.get(sample, -1)}
                read_again_by |= dict.fromkeys(failure.suspected, done + AHEAD * self.num_workers)
                bad = failure.crashed | repeated
                restarts = 0 if bad else restarts + 1
                reason = f"its worker crashed or did not respond: {str(error).splitlines()[0]}"
                what = (
                    f" without samples {sorted(bad)}"
                    if bad
                    else f"; samples {sorted(failure.suspected)} are read again"
                )
                logger.warning("restarting the data workers%s: %s", what, reason)
                self.source.dataset.unreadable |= dict.fromkeys(bad, reason)

    def _next(self, batches: Iterator[Batch | UserError], monitor: WorkerMonitor) -> Batch | UserError | None:
        """Return the next batch; None after the last one.

        Raises:
            RuntimeError: A worker has ended, or there was no batch within `timeout` seconds.
        """
        waited = 0
        while True:
            try:
                return next(batches, None)
            except (ConnectionError, EOFError, FileNotFoundError) as error:
                # A worker that is killed closes its connections before it counts as ended.
                if not monitor.wait_for_end(SECONDS_TO_END):
                    raise
                raise RuntimeError(f"DataLoader worker ended while it sent a batch: {error}") from error
            except RuntimeError as error:
                # torch raises this every `CHECK_SECONDS` unless a worker has ended; its iterator can be asked again.
                if not str(error).startswith("DataLoader timed out"):
                    raise
                waited += CHECK_SECONDS
                if waited >= self.timeout:
                    raise RuntimeError(f"DataLoader timed out after {self.timeout} seconds") from None

    def _batches(self, steps: range, monitor: WorkerMonitor) -> Iterator[Batch | UserError]:
        handler = signal.getsignal(signal.SIGCHLD)
        if getattr(handler, "__module__", "") == signal_handling.__name__:  # set by another DataLoader before
            handler = signal.SIG_DFL
        loader = DataLoader(
            _ErrorsAsValues(self.source),
            batch_size=None,
            sampler=steps,
            num_workers=self.num_workers,
            # Also in a process that was spawned itself: spawned workers would import everything anew each epoch.
            multiprocessing_context="fork" if self.num_workers else None,
            pin_memory=self.pin_memory,
            timeout=min(CHECK_SECONDS, self.timeout) if self.num_workers else 0,
            worker_init_fn=functools.partial(_start_worker, monitor, os.getpid()),
            # Without a generator it draws from torch's global one, and a resumed run would differ.
            generator=torch.Generator(),
        )
        with monitor.starting():
            batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise the death of a worker in the middle of a training step. Without it, the error
            # is raised where the batch is requested.
            signal.signal(signal.SIGCHLD, handler)
        return batches


def _explain_memory(error: RuntimeError) -> Exception:
    """Return a UserError where workers have no room for batches in shared memory, else the error itself."""
    message = str(error)
    if not any(sign in message for sign in ("Bus error", "shared memory", "No space left on device")):
        return error
    free = shutil.disk_usage("/dev/shm").free / 2**20 if os.path.isdir("/dev/shm") else 0
    return UserError(
        f"data workers pass batches through /dev/shm, which is full ({free:.0f} MB are free now). Enlarge it (docker "
        "run --shm-size=16g, or mount -o remount,size=16g /dev/shm), or set data.num_workers=0 or fewer, or a smaller "
        f"batch size ({message.splitlines()[0]})"
    )


class _ErrorsAsValues(TorchDataset):
    """Returns user errors from a worker unchanged; torch would wrap them in an error with the worker's traceback."""

    def __init__(self, source: BatchSource):
        self.source = source

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.source[step]
        except UserError as error:
            return error


def _start_worker(monitor: WorkerMonitor, parent: int, worker: int) -> None:
    leave_signals_to(parent)  # the main process needs its workers to finish its step
    _keep_freed_memory()
    monitor.attach(worker)


def _keep_freed_memory() -> None:
    """Keep glibc from returning freed memory: getting new pages for each clip takes as long as resizing it."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
