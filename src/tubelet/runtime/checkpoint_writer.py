"""Checkpoints that are written while training continues."""

from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint_format import CheckpointError, CheckpointState, Snapshot
from tubelet.runtime.distributed import World


class Saver:
    """Writes one checkpoint at a time into `folder`. Training waits only until the state is copied to host memory.

    Args:
        folder: The run's folder `checkpoints`.
        keep: Number of checkpoints that are kept.
        world: All of its processes make the same calls.
        sharded: Every process writes its shards; else rank 0 writes everything.
        keep_steps: Steps whose checkpoints are kept besides.
    """

    def __init__(self, folder: Path, keep: int, world: World, sharded: bool, keep_steps: Collection[int] = ()):
        self.folder, self.keep, self.world, self.keep_steps = folder, keep, world, keep_steps
        self.sharded = sharded and world.world_size > 1
        self._thread = ThreadPoolExecutor(1, "saving")
        # Messages about a checkpoint must not be mixed with those of the training steps meanwhile.
        self._group: dist.ProcessGroup | None = None
        if self.sharded:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)  # all processes are in it
            self._group = group
        self._writing: Future | None = None
        self._buffers: dict[str, Tensor] = {}

    def start(self, step: int, state: Callable[[], CheckpointState]) -> None:
        """Begin to write `state()`; an error of the checkpoint before is raised here."""
        self.finish()
        rank, size = (self.world.rank, self.world.world_size) if self.sharded else (0, 1)
        if self.sharded or self.world.is_main:
            snapshot = Snapshot(state(), rank, self._buffers)
            arguments = (self.folder, step, snapshot, self.keep, rank, size, self._on_all_ranks, self.keep_steps)
            self._writing = self._thread.submit(checkpoint.write, *arguments)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises CheckpointError if that failed."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except Exception as error:
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({error}). Those before it are complete: make room, "
                "and start the same command again"
            ) from error

    def close(self) -> None:
        self._thread.shutdown()

    def _on_all_ranks(self, action: Callable[[], Any]) -> list[Any]:
        """See `checkpoint.write`."""
        if not self.sharded:
            return [action()]
        result = error = None
        try:
            result = action()
        except Exception as raised:
            error = raised
        outcomes: list[Any] = [None] * self.world.world_size
        dist.all_gather_object(outcomes, (result, None if error is None else repr(error)), group=self._group)
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise CheckpointError(f"rank {rank}: {failure}")
        return [result for result, _ in outcomes]
