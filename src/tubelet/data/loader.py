"""Batches from worker processes: the same ones whatever the number of workers, from any step on."""

import ctypes
import functools
import platform
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from tubelet.config import UserError
from tubelet.data import Batch, Draw, Sample
from tubelet.data.randomness import Purpose, generator
from tubelet.data.streams import SampleStream
from tubelet.data.worker_monitor import WorkerMonitor

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


class SampleSource(Protocol):
    """What a dataset file's `Dataset` is to a loader."""

    refused: dict[int, str]

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw) -> Sample: ...


class MaskSampler(Protocol):
    def sample_masks(
        self, batch_size: int, rng: np.random.Generator
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]: ...


def make_train_loader(
    dataset: SampleSource,
    stream: SampleStream,
    masks: MaskSampler | None,
    *,
    seed: int,
    first_step: int,
    last_step: int,
    mask_batch_size: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    pin_memory: bool = False,
    timeout: int = 0,
) -> Iterable[Batch]:
    """The batches of steps first_step .. last_step - 1 for one process.

    A batch depends on `seed` and its step only. Masks are drawn together for each `mask_batch_size` samples of the
    global batch (None: for all of it), so that one process or several see the same rows. timeout: seconds to wait for a
    batch before the video it is stuck at counts as bad; 0: for ever.
    """
    if stream.batch_size % world_size:
        raise ValueError(f"a global batch of {stream.batch_size} cannot be shared by {world_size} processes")
    rows = stream.batch_size // world_size
    together = mask_batch_size or stream.batch_size
    if stream.batch_size % together or together % rows:
        raise ValueError(
            f"mask_batch_size {together} does not divide the global batch of {stream.batch_size} into groups of whole "
            f"processes' batches of {rows}"
        )
    source = _TrainBatches(dataset, stream, masks, seed, slice(rank * rows, (rank + 1) * rows), together)
    return Loader(source, range(first_step, last_step), num_workers, pin_memory, timeout)


def make_eval_loader(
    dataset: SampleSource,
    *,
    batch_size: int,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    timeout: int = 0,
) -> Iterable[Batch]:
    """Each sample once and in order, nothing padded; process `rank` of `world_size` gets every world_size-th sample.

    Excluded samples are missing from their batch, with the reason in its `bad`; a batch may so be empty.
    """
    source = _EvalBatches(dataset, range(rank, len(dataset), world_size), batch_size)
    return Loader(source, range(len(source)), num_workers, pin_memory, timeout)


def collate(samples: list[Sample], step: int) -> Batch:
    """Stack samples; those excluded are left out, what was bad is kept."""
    kept = [sample for sample in samples if not sample.excluded]
    return Batch(
        # In a worker, default_collate writes to memory shared with the main process; a copy would go there otherwise.
        clips=default_collate([s.clips for s in kept]).flatten(0, 1) if kept else torch.empty(0, dtype=torch.uint8),
        labels=torch.tensor([sample.label for sample in kept], dtype=torch.int64),
        indices=torch.tensor([sample.index for sample in kept], dtype=torch.int64),
        paths=tuple(sample.path for sample in kept),
        frames=torch.stack([sample.frames for sample in kept]) if kept else torch.empty(0, dtype=torch.int64),
        step=step,
        bad=tuple(bad for sample in samples for bad in sample.bad),
    )


class _TrainBatches:
    """A map from step to batch, so that a worker makes whole batches and the loader's order is the order of steps."""

    def __init__(
        self,
        dataset: SampleSource,
        stream: SampleStream,
        masks: MaskSampler | None,
        seed: int,
        rows: slice,
        mask_batch_size: int,
    ):
        self.dataset, self.stream, self.masks, self.seed, self.rows = dataset, stream, masks, seed, rows
        self.mask_batch_size = mask_batch_size

    def __getitem__(self, step: int) -> Batch:
        batch = collate([self.dataset[draw] for draw in self.stream.draws(step)[self.rows]], step)
        if self.masks is None:
            return batch
        clips_per_sample = len(batch.clips) // len(batch)
        group, first = divmod(self.rows.start, self.mask_batch_size)
        rows = slice(first * clips_per_sample, first * clips_per_sample + len(batch.clips))
        rng = generator(self.seed, Purpose.MASKS, step, group)
        context, target = self.masks.sample_masks(self.mask_batch_size * clips_per_sample, rng)
        return batch.with_masks([mask[rows] for mask in context], [mask[rows] for mask in target])


class _EvalBatches:
    def __init__(self, dataset: SampleSource, indices: range, batch_size: int):
        self.dataset, self.indices, self.batch_size = dataset, indices, batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        indices = self.indices[step * self.batch_size : (step + 1) * self.batch_size]
        return collate([self.dataset[Draw(step, 0, index, slot)] for slot, index in enumerate(indices)], step)


class Loader:
    """`source[step]` of each of `steps`, in order, made by worker processes.

    A video that crashes a worker, or keeps it for `timeout` seconds, is refused from then on: `source.dataset` treats
    it as unreadable.
    """

    def __init__(self, source, steps: range, num_workers: int, pin_memory: bool, timeout: int):
        self.source, self.steps = source, steps
        self.num_workers, self.pin_memory, self.timeout = num_workers, pin_memory, timeout

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        done = 0
        while done < len(self.steps):
            videos = WorkerMonitor(self.num_workers)
            batches = self._batches(self.steps[done:], videos)
            try:
                for batch in batches:
                    if isinstance(batch, UserError):
                        videos.kill_workers()  # the error keeps this frame, and so them, for as long as it is looked at
                        raise batch
                    done += 1
                    yield batch
            except RuntimeError as error:
                culprits = videos.stuck()
                videos.kill_workers()
                if not culprits:
                    raise
                reason = f"its worker crashed or gave no answer: {str(error).splitlines()[0]}"
                self.source.dataset.refused |= dict.fromkeys(culprits, reason)

    def _batches(self, steps: range, videos: WorkerMonitor) -> Iterator[Batch | UserError]:
        before = signal.getsignal(signal.SIGCHLD)
        batches = iter(
            DataLoader(
                _ErrorsAsValues(self.source),
                batch_size=None,
                sampler=steps,
                num_workers=self.num_workers,
                # Also in a process that was spawned itself, whose workers would else import everything anew each epoch.
                multiprocessing_context="fork" if self.num_workers else None,
                pin_memory=self.pin_memory,
                timeout=self.timeout if self.num_workers else 0,
                worker_init_fn=functools.partial(_start_worker, videos),
                # Without its own generator it takes a number from torch's global one, and a resumed run would differ.
                generator=torch.Generator(),
            )
        )
        if threading.current_thread() is threading.main_thread():
            # torch's handler would raise the death of a worker in the middle of a training step; without it, it is
            # raised where the batch is asked for.
            signal.signal(signal.SIGCHLD, before)
        return batches


class _ErrorsAsValues:
    """What the user can mend comes out of a worker as it is: torch would make another error of it and its trace."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.source[step]
        except UserError as error:
            return error


def _start_worker(videos: WorkerMonitor, worker: int) -> None:
    """Ctrl-C and a cluster's warning reach every process; the main one wants its workers alive to finish its step."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    _keep_freed_memory()
    videos.join(worker)


def _keep_freed_memory() -> None:
    """Let glibc hold on to what is freed: to get fresh pages for each clip takes as long as to resize it."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
