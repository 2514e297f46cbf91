"""Collate samples to batches."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from tubelet.config import UserError
from tubelet.data.types import Batch, Sample


def collate(samples: list[Sample], step: int) -> Batch:
    """Stack samples. Excluded ones are dropped; the `bad` files of all are kept.

    Targets are stacked by kind: int and bool to int64 [B], other numbers to float32 [B], str to a tuple of B, arrays,
    tensors and sequences of numbers to [B, …].

    Raises:
        UserError: The samples differ in the names, kinds or shapes of their views or targets.
    """
    kept = [sample for sample in samples if not sample.excluded]
    views, targets = _columns(kept, "views"), _columns(kept, "targets")
    return Batch(
        views={name: _stack(view, f"view '{name}'", kept).flatten(0, 1) for name, view in views.items()},
        targets={name: _stack_targets(target, f"target '{name}'", kept) for name, target in targets.items()},
        indices=torch.tensor([sample.index for sample in kept], dtype=torch.int64),
        paths=tuple(sample.path for sample in kept),
        frames=torch.stack([sample.frames for sample in kept]) if kept else torch.empty(0, dtype=torch.int64),
        step=step,
        bad=tuple(bad for sample in samples for bad in sample.bad),
    )


def _columns(samples: list[Sample], field: str) -> dict[str, list[Any]]:
    """Name -> the value of each sample, of `Sample.views` or `Sample.targets`."""
    if not samples:
        return {}
    names = getattr(samples[0], field).keys()
    for sample in samples:
        if (others := getattr(sample, field).keys()) != names:
            raise UserError(
                f"{sample.path} has the {field} {', '.join(others) or '(none)'}, {samples[0].path} has "
                f"{', '.join(names) or '(none)'}; all samples of a data set need the same"
            )
    return {name: [getattr(sample, field)[name] for sample in samples] for name in names}


def _stack(tensors: list[Tensor], what: str, samples: list[Sample]) -> Tensor:
    for tensor, sample in zip(tensors, samples, strict=True):
        if tensor.shape != tensors[0].shape or tensor.dtype != tensors[0].dtype:
            kinds = [f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (tensor, tensors[0])]
            raise UserError(
                f"{what} of {sample.path} is {kinds[0]}, of {samples[0].path} {kinds[1]}; the samples of a batch need "
                "one shape and type: bring them to it in the data set or its transform"
            )
    # In a worker, default_collate writes to memory shared with the main process; a copy would go there otherwise.
    return default_collate(tensors)


def _stack_targets(values: list[Any], what: str, samples: list[Sample]) -> Tensor | tuple[str, ...]:
    if all(isinstance(value, str) for value in values):
        return tuple(values)
    if all(isinstance(value, Integral) for value in values):
        return torch.tensor(values, dtype=torch.int64)
    if all(isinstance(value, Real) for value in values):
        return torch.tensor(values, dtype=torch.float32)
    for value, sample in zip(values, samples, strict=True):
        if not isinstance(value, Tensor | np.ndarray | Sequence) or isinstance(value, str):
            raise UserError(
                f"{what} of {sample.path} is a {type(value).__name__}, of {samples[0].path} a "
                f"{type(values[0]).__name__}; expected for all samples a number, a string, or an array"
            )
    return _stack([torch.as_tensor(value) for value in values], what, samples)
