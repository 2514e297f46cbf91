"""Compute something for each sample of an evaluation, in all processes together."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from tubelet.data import Batch
from tubelet.data.workers import Loader
from tubelet.runtime.precision import autocast
from tubelet.runtime.watchdog import Watchdog

T = TypeVar("T")


@torch.no_grad()
def map_samples(
    compute: Callable[[Batch], Sequence[T]], model: nn.Module, batches: Loader, dtype: torch.dtype, watchdog: Watchdog
) -> tuple[dict[int, T], dict[str, str]]:
    """Return the result for each sample, by index, and the reason for each file that could not be read.

    Each process computes those of its batches; all get all.

    Args:
        compute: Maps a batch on the device to one result for each sample.
        model: What `compute` uses; it is in evaluation mode there.
        batches: This process's part of the samples, from `make_eval_loader`.
        dtype: Autocast type of `compute`.
        watchdog: Of the run.
    """
    world = watchdog.world
    found: dict[int, T] = {}
    bad: dict[str, str] = {}
    model.eval()
    for number, batch in enumerate(batches):
        watchdog.note(f"batch {number + 1} of {len(batches)} of the evaluation")
        bad |= {file.path: file.reason for file in batch.bad}
        if len(batch):
            with autocast(world.device, dtype):
                results = compute(batch.to(world.device))
            found |= dict(zip(batch.indices.tolist(), results, strict=True))
    model.train()
    parts = world.all_gather_object((found, bad))
    return (
        {index: result for part, _ in parts for index, result in part.items()},
        {path: reason for _, part in parts for path, reason in part.items()},
    )
