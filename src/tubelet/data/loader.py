"""Load batches in worker processes, from any step on; they do not depend on the number of workers."""

import ctypes
import functools
import logging
import os
import platform
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset  # a module with the name `Dataset` would be a data format
from torch.utils.data._utils import signal_handling

from tubelet.config import UserError
from tubelet.data.collate import collate
from tubelet.data.mask_draws import MaskSampler, draw_masks
from tubelet.data.options import MaskLengths
from tubelet.data.streams import SampleStream
from tubelet.data.types import Batch, Draw, Sample
from tubelet.data.worker_monitor import WorkerMonitor
from tubelet.runtime.distributed import World
from tubelet.runtime.parent import leave_signals_to

logger = logging.getLogger(__name__)

MAX_RESTARTS = 3
"""Restarts of the workers in a row without a batch or the video that is the reason."""
AHEAD = 3
"""Steps by which each worker may be ahead of the last batch: those it has finished (`prefetch_factor`), and one."""
CHECK_SECONDS = 5
"""Seconds without a batch after which the main process looks whether a worker has ended."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
ONE_PROCESS = World()


class SampleSource(Protocol):
    """The part of a data set that a loader uses; see `video_dataset.Dataset`."""

    unreadable: dict[int, str]

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw) -> Sample: ...


class BatchSource(Protocol):
    """`source[step]` is the batch of a step. A worker makes complete batches, so they keep the order of the steps."""

    dataset: SampleSource

    def __getitem__(self, step: int) -> Batch: ...


def make_train_loader(
    dataset: SampleSource,
    stream: SampleStream,
    masks: MaskSampler | None = None,
    *,
    seed: int,
    first_step: int,
    last_step: int,
    mask_batch_size: int | None = None,
    mask_lengths: MaskLengths = "shared",
    world: World = ONE_PROCESS,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout: int = 0,
) -> "Loader":
    """Return the batches of steps `first_step` to `last_step` - 1 for one process.

    A batch depends on `seed` and its step only. The batches of all processes together do not depend on their number.

    Args:
        dataset: The samples.
        stream: The draws of each step; its batch size is that of all processes together.
        masks: Draws the masks for the view `clip`; None for batches without masks.
        seed: Seed of the masks.
        first_step: 0, or the step at which a run is resumed.
        last_step: Number of steps of the whole run.
        mask_batch_size: Samples whose masks are drawn together; None: the global batch. See `DataConfig`.
        mask_lengths: How many tokens the masks keep, see `DataConfig`.
        world: The processes; each loads an equal part of a batch.
        num_workers: Worker processes; 0: batches are made in this process.
        pin_memory: Copy batches to pinned memory.
        timeout: Seconds to wait for a batch until the video that blocks a worker is marked unreadable; 0: no limit.
    """
    if stream.batch_size % world.world_size:
        raise ValueError(f"a global batch of {stream.batch_size} cannot be divided among {world.world_size} processes")
    local_size = stream.batch_size // world.world_size
    mask_batch_size = mask_batch_size or stream.batch_size
    if stream.batch_size % mask_batch_size or mask_batch_size % local_size:
        raise ValueError(
            f"mask_batch_size {mask_batch_size} must divide the global batch of {stream.batch_size} and be a multiple "
            f"of the {local_size} samples of a process"
        )
    local = slice(world.rank * local_size, (world.rank + 1) * local_size)
    source = _TrainBatches(dataset, stream, masks, seed, local, mask_batch_size, mask_lengths)
    return Loader(source, range(first_step, last_step), num_workers, pin_memory, timeout)


def make_eval_loader(
    dataset: SampleSource,
    *,
    batch_size: int,
    indices: Sequence[int] | None = None,
    world: World = ONE_PROCESS,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout: int = 0,
) -> "Loader":
    """Return a loader that reads each sample once, in order, without padding; a process gets every `world_size`-th.

    Excluded samples are missing from their batch, whose `bad` has the reasons; a batch may be empty.

    Args:
        dataset: The samples.
        indices: The samples to read; None: all.
        batch_size: Samples of a batch of a process.
        world, num_workers, pin_memory, timeout: See `make_train_loader`.
    """
    indices = range(len(dataset)) if indices is None else indices
    source = _EvalBatches(dataset, indices[world.rank :: world.world_size], batch_size)
    return Loader(source, range(len(source)), num_workers, pin_memory, timeout)


class _TrainBatches:
    def __init__(
        self,
        dataset: SampleSource,
        stream: SampleStream,
        masks: MaskSampler | None,
        seed: int,
        local: slice,
        mask_batch_size: int,
        mask_lengths: MaskLengths,
    ):
        self.dataset, self.stream, self.masks, self.seed, self.local = dataset, stream, masks, seed, local
        self.mask_batch_size, self.mask_lengths = mask_batch_size, mask_lengths

    def __getitem__(self, step: int) -> Batch:
        batch = collate([self.dataset[draw] for draw in self.stream.draws(step)[self.local]], step)
        if self.masks is None:
            return batch
        clips_per_sample = len(batch.clips) // len(batch)
        group, first = divmod(self.local.start, self.mask_batch_size)
        rows = slice(first * clips_per_sample, first * clips_per_sample + len(batch.clips))
        together = self.mask_batch_size * clips_per_sample
        context, target = draw_masks(
            self.masks, together, seed=self.seed, step=step, group=group, lengths=self.mask_lengths
        )
        return batch.with_masks([mask[rows] for mask in context], [mask[rows] for mask in target])


class _EvalBatches:
    def __init__(self, dataset: SampleSource, indices: Sequence[int], batch_size: int):
        self.dataset, self.indices, self.batch_size = dataset, indices, batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        indices = self.indices[step * self.batch_size : (step + 1) * self.batch_size]
        return collate([self.dataset[Draw(step, 0, int(i), position)] for position, i in enumerate(indices)], step)


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
                while (batch := self._next(batches)) is not None:
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

    def _next(self, batches: Iterator[Batch | UserError]) -> Batch | UserError | None:
        """Return the next batch; None after the last one.

        Raises:
            RuntimeError: A worker has ended, or there was no batch within `timeout` seconds.
        """
        waited = 0
        while True:
            try:
                return next(batches, None)
            except RuntimeError as error:
                # torch raises this every `CHECK_SECONDS` unless a worker has ended; its iterator can be asked again.
                waited += CHECK_SECONDS
                if waited >= self.timeout or not str(error).startswith("DataLoader timed out"):
                    raise

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
