"""Data types between the files and the training loop: `Draw` -> `Sample` -> `Batch`."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tubelet.config import UserError
from tubelet.config.addresses import public


class VideoError(UserError):
    """A file that cannot be used as a clip. `filtered`: excluded by an option (too short, too long), not broken.

    Addresses lose their credentials, because messages and `path` are written to logs and reports.

    Attributes:
        always: Whether every clip of the file meets this error, now and later.
    """

    always = False

    def __init__(self, path: str, reason: str, filtered: bool = False):
        super().__init__(public(path), reason, filtered)  # all as arguments, so that pickle can rebuild it
        self.path, self.reason, self.filtered = public(path), reason, filtered

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Draw:
    """A request for one sample of a data set.

    Attributes:
        step: The step that the sample is for.
        epoch: The pass over its source; each pass selects other clips and augmentations.
        index: The sample's index in the data set.
        position: The sample's position in the global batch of the step.
    """

    step: int
    epoch: int
    index: int
    position: int


@dataclass(frozen=True)
class BadFile:
    """A video that was not used, and why; `filtered` as in `VideoError`."""

    path: str
    reason: str
    filtered: bool = False


@dataclass(frozen=True)
class Sample:
    """The clips of one video.

    Attributes:
        views: name -> uint8 [n, C, T, H, W]. With a transform of a single view, `clip` with n = num_clips × crops,
            segment-major. Views may differ in n and in size. Empty where the sample is excluded.
        targets: name -> class or number (int, float), text (str), vector or dense target (array or tensor). Data sets
            of class labels have `label`, -1 where a sample has none.
        index: The sample's index in the data set.
        path: The file.
        frames: int64 [num_clips, T], the frame numbers in the file.
        bad: Videos that could not be used and were replaced by this one (training), or why it is excluded (evaluation).
    """

    views: dict[str, Tensor]
    targets: dict[str, Any]
    index: int
    path: str
    frames: Tensor
    bad: tuple[BadFile, ...] = ()

    @property
    def excluded(self) -> bool:
        return not self.views

    @property
    def clips(self) -> Tensor:
        """uint8 [n, C, T, H, W], the view `clip`."""
        return self.views["clip"]


@dataclass(frozen=True)
class Batch:
    """B samples; view v has n_v clips of each.

    Row b · n_v + j of a view is clip j of sample b. The masks belong to the view `clip` and have its rows.

    Attributes:
        views: name -> uint8 [B·n_v, C, T, H, W]; empty where B = 0.
        targets: name -> int64 [B] of classes, float32 [B] of numbers, a tensor [B, …], or a tuple of B strings or
            other values, which stays on the host.
        indices: int64 [B], the samples' indices in the data set.
        paths: Their files.
        frames: int64 [B, num_clips, T], the frame numbers in the files.
        step: The step that the batch is for.
        bad: The files that could not be used.
        masks_context: For each mask of the configuration, int64 [B·n, K] tokens to encode; empty without masks.
        masks_target: For each mask of the configuration, int64 [B·n, K'] tokens to predict; empty without masks.
        num_global: Samples of the step over all processes; None where every process has equally many.
    """

    views: dict[str, Tensor]
    targets: dict[str, Tensor | tuple[Any, ...]]
    indices: Tensor
    paths: tuple[str, ...]
    frames: Tensor
    step: int
    bad: tuple[BadFile, ...] = ()
    masks_context: tuple[Tensor, ...] = ()
    masks_target: tuple[Tensor, ...] = ()
    num_global: int | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def clips(self) -> Tensor:
        """uint8 [B·n, C, T, H, W], the view `clip`."""
        return self.views["clip"]

    @property
    def labels(self) -> Tensor:
        """int64 [B], the target `label`."""
        return self.tensor("label")

    def tensor(self, name: str) -> Tensor:
        """Return the target `name`, which must not be a tuple."""
        target = self.targets[name]
        assert isinstance(target, Tensor)
        return target

    @property
    def num_clips(self) -> int:
        """Clips of all views together."""
        return sum(len(view) for view in self.views.values())

    def pin_memory(self) -> "Batch":
        return self._map_tensors(Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "Batch":
        """Copy to `device`; asynchronous where the memory is pinned."""
        return self._map_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def with_masks(self, context: Sequence[Tensor], target: Sequence[Tensor]) -> "Batch":
        return dataclasses.replace(self, masks_context=tuple(context), masks_target=tuple(target))

    def split(self, parts: int) -> list["Batch"]:
        """Split into at most `parts` batches of consecutive samples, none empty; only the last may be smaller.

        `num_global` stays that of the step, and the first part has the step's `bad` files.
        """
        size = max(1, -(-len(self) // parts))
        return [self._samples(start, min(start + size, len(self))) for start in range(0, max(1, len(self)), size)]

    def _samples(self, start: int, stop: int) -> "Batch":
        """Return samples `start` to `stop` - 1; tensors are views of this batch's memory."""
        total = max(1, len(self))

        def rows(tensor: Tensor) -> Tensor:
            per_sample = len(tensor) // total
            return tensor[start * per_sample : stop * per_sample]

        part = self._map_tensors(rows)
        targets = {k: v[start:stop] if isinstance(v, tuple) else v for k, v in part.targets.items()}
        bad = self.bad if start == 0 else ()
        return dataclasses.replace(part, targets=targets, paths=self.paths[start:stop], bad=bad)

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        def mapped(value: Any) -> Any:
            return function(value) if isinstance(value, Tensor) else value

        return dataclasses.replace(
            self,
            views={name: mapped(view) for name, view in self.views.items()},
            targets={name: mapped(target) for name, target in self.targets.items()},
            indices=mapped(self.indices),
            frames=mapped(self.frames),
            masks_context=tuple(mapped(mask) for mask in self.masks_context),
            masks_target=tuple(mapped(mask) for mask in self.masks_target),
        )


class SampleSource(Protocol):
    """The part of a data set that a loader uses; see `video_dataset.Dataset`."""

    unreadable: dict[int, str]

    def __len__(self) -> int: ...

    def __getitem__(self, draw: Draw) -> Sample: ...
