"""Checkpoints that are written while training goes on."""

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World


class Saver:
    """Writes one checkpoint at a time into `folder`. Training waits only until the state is copied to host memory.

    sharded: every process writes its share; else the main process writes all. All processes make the same calls.
    """

    def __init__(self, folder: Path, keep: int, world: World, sharded: bool):
        self.folder, self.keep, self.world, self.sharded = folder, keep, world, sharded
        self._thread = ThreadPoolExecutor(1, "saving")
        # Messages about a checkpoint must not meet those of the training step that goes on.
        self._group = dist.new_group(backend="gloo") if sharded else None
        self._writing: Future | None = None
        self._copy: dict[str, Any] = {}

    def start(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Begin to write `state()`; an error of the checkpoint before is raised here."""
        self.finish()
        if self.sharded:
            self._writing = self._start_shards(step, state())
        elif self.world.is_main:
            self._copy = _on_host(state(), self._copy)
            self._writing = self._thread.submit(checkpoint.save, self.folder, step, self._copy, self.keep)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written. Raises CheckpointError where it could not be."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except Exception as error:
            raise checkpoint.CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({_first(error)}). Those before it are whole: make "
                "room, and start the same command again"
            ) from error

    def close(self) -> None:
        self._thread.shutdown()

    def _start_shards(self, step: int, state: dict[str, Any]) -> Future:
        tensors, rest = checkpoint.tensors_and_rest(state)
        aside, path = (self.folder / f"step-{step:08d}{suffix}" for suffix in (".tmp", ".dcp"))
        if self.world.is_main:
            aside.mkdir(parents=True, exist_ok=True)
            checkpoint.write(aside / checkpoint.REST, rest)
        dist.barrier(self._group)
        written = dcp.async_save(tensors, checkpoint_id=aside, process_group=self._group)

        def complete() -> None:
            try:
                written.result()  # of the main process: only when all have written, or one could not
                if self.world.is_main:
                    checkpoint.adopt(aside, path, self.keep)
            except BaseException:
                if self.world.is_main:
                    with contextlib.suppress(OSError):  # what went wrong first is what counts; see `checkpoint.write`
                        checkpoint.remove(aside)
                raise

        return self._thread.submit(complete)


def _first(error: BaseException) -> BaseException:
    """What went wrong first: of a full disk, torch's writer says afterwards that its positions are unexpected."""
    while error.__context__ is not None:
        error = error.__context__
    return error


def _on_host(state: Any, place: Any) -> Any:
    """A copy that the next training step does not change, in the memory of an earlier copy where it fits.

    To touch fresh memory takes several times as long as to copy.
    """
    if isinstance(state, torch.Tensor):
        fits = isinstance(place, torch.Tensor) and (place.shape, place.dtype) == (state.shape, state.dtype)
        return (place if fits else torch.empty_like(state, device="cpu")).copy_(state.detach())
    if isinstance(state, dict):
        places = place if isinstance(place, dict) else {}
        return {key: _on_host(value, places.get(key)) for key, value in state.items()}
    if isinstance(state, list):
        places = place if isinstance(place, list) and len(place) == len(state) else [None] * len(state)
        return [_on_host(*pair) for pair in zip(state, places, strict=True)]
    return state
