"""Labelled videos of supervised training: which samples of a step each process reads."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from app.classification.options import Options
from tubelet.config import ConfigError
from tubelet.data import Batch
from tubelet.probing import split
from tubelet.probing.clips import LabelledClips, labelled_sets
from tubelet.probing.features import IGNORED
from tubelet.runtime.distributed import World
from tubelet.runtime.seeds import torch_generator
from tubelet.runtime.watchdog import Watchdog


class Videos:
    """Training and validation videos.

    The samples of a step depend on the seed and the step alone; each process reads an equal part of them.

    Args:
        options: Options as returned by `with_normalization`.
        world: The processes of the run.

    Attributes:
        shuffled: The validation videos with the frames of each clip in random order; None if they are not needed.
        excluded: path -> reason of the files that no process could read so far.
        lists: Hash of all paths and labels.
    """

    def __init__(self, options: Options, world: World):
        self.options, self.world, self.seed = options, world, options.meta.seed
        data, o = options.data, options.optimization
        self.train, self.val, self.shuffled = labelled_sets(
            data,
            options.data_aug,
            resolution=o.resolution,
            seed=self.seed,
            shuffle_frames=options.evaluation.shuffle_frames,
            world=world,
        )
        self.lists = split.fingerprint(self.train.paths, self.train.labels, self.val.paths, self.val.labels)
        self.chosen = torch.tensor(split.labelled_subset(self.train.labels, data, self.seed))
        self.global_batch = o.batch_size * world.world_size
        self.steps_per_epoch = -(-len(self.chosen) // self.global_batch)
        self.last_step = o.num_epochs * self.steps_per_epoch
        self.excluded: dict[str, str] = {}
        self._shuffled: tuple[int, Tensor] | None = None

    def metadata(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"excluded": dict(self.excluded), "lists": self.lists}

    def load_metadata(self, metadata: dict[str, Any]) -> None:
        """Continue from a checkpoint. Raises ConfigError where it was made with other videos or labels."""
        self.check_same_lists(metadata)
        self.excluded = metadata["excluded"]

    def check_same_lists(self, stored: dict[str, Any]) -> None:
        """Raise ConfigError where a checkpoint or results.json of the folder was made with other lists."""
        if stored.get("lists", self.lists) != self.lists:  # the first versions did not store them
            raise ConfigError(
                f"{self.options.folder} holds a run on other videos or labels than data.dataset_train and "
                "data.dataset_val name now; choose another folder=…, or remove that one"
            )

    def num_train(self) -> int:
        """Return the number of readable training videos."""
        return sum(self.train.paths[i] not in self.excluded for i in self.chosen.tolist())

    def steps(self, first: int) -> Iterator[Batch]:
        """Yield this process's part of each step from `first` to the last.

        A process without samples gets one clip of zeros with the label IGNORED, because gradients are averaged over all
        processes. The target `position` holds the positions of the samples in the global batch.
        """
        batches = self.train.steps(
            lambda step: (step // self.steps_per_epoch, self._samples(step)[0]), range(first, self.last_step)
        )
        for batch in batches:
            num_global = max(1, self._count(batch))
            if len(batch):
                targets = {**batch.targets, "position": tuple(self._positions(batch))}
                yield dataclasses.replace(batch, targets=targets, num_global=num_global)
            else:
                yield self._placeholder(batch, num_global)

    def validation(self, clips: LabelledClips, indices: Tensor, watchdog: Watchdog) -> Iterator[Batch]:
        """Yield this process's part of the samples `indices` of `clips`, `val` or `shuffled`.

        All processes take the same number of steps.
        """
        batches = indices.split(self.global_batch)
        local = [part.tensor_split(self.world.world_size)[self.world.rank] for part in batches]
        for number, batch in enumerate(clips.batches(local)):
            watchdog.note(f"batch {number + 1} of {len(local)} of {clips.source}")
            self._count(batch)
            if len(batch):
                yield batch

    def _count(self, batch: Batch) -> int:
        """Return the number of videos in the parts of all processes, and record unreadable ones."""
        parts = self.world.all_gather_object((len(batch), {bad.path: bad.reason for bad in batch.bad}))
        for _, unreadable in parts:
            self.excluded |= unreadable
        return sum(count for count, _ in parts)

    def _placeholder(self, batch: Batch, num_global: int) -> Batch:
        data, side = self.options.data, self.options.optimization.resolution
        return dataclasses.replace(
            batch,
            views={"clip": torch.zeros(data.num_segments, 3, data.frames_per_clip, side, side, dtype=torch.uint8)},
            targets={"label": torch.tensor([IGNORED]), "position": ()},
            indices=torch.tensor([-1]),
            paths=("",),
            frames=torch.zeros(1, data.num_segments, data.frames_per_clip, dtype=torch.int64),
            num_global=num_global,
        )

    def _positions(self, batch: Batch) -> list[int]:
        """Return the positions of the batch's samples in the global batch, without those that could not be read."""
        samples, first = self._samples(batch.step)
        read = set(batch.indices.tolist())
        return [first + i for i, index in enumerate(samples.tolist()) if index in read]

    def _samples(self, step: int) -> tuple[Tensor, int]:
        """Return this process's samples of a step and the position of the first; mixed pairs stay together."""
        epoch, number = divmod(step, self.steps_per_epoch)
        batch = self._order(epoch)[number * self.global_batch : (number + 1) * self.global_batch]
        unit = 2 if self.options.optimization.mixes else 1
        units = torch.arange(-(-len(batch) // unit)).tensor_split(self.world.world_size)[self.world.rank]
        first = unit * int(units[0]) if len(units) else 0
        return batch[first : first + unit * len(units)], first

    def _order(self, epoch: int) -> Tensor:
        """Return the shuffled samples of an epoch, kept until another epoch is requested."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            order = torch.randperm(len(self.chosen), generator=torch_generator(self.seed, "order", epoch))
            self._shuffled = epoch, self.chosen[order]
        return self._shuffled[1]
