"""Which videos of which step are a process's, and how they enter the model."""

from collections.abc import Iterator
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from app.classification.options import Options
from tubelet.config import ConfigError
from tubelet.data import Batch, to_float
from tubelet.probing import split
from tubelet.probing.clips import train_and_val
from tubelet.probing.features import IGNORED
from tubelet.runtime.distributed import World
from tubelet.runtime.seeds import generator
from tubelet.runtime.watchdog import Watchdog


class Videos:
    """Labelled videos to train on and to validate with.

    The samples of a step depend on the seed and the step alone; each process has an equal part of them. options: from
    `with_normalization`. excluded: path -> reason, of the files that could not be read so far, by any process. lists: a
    hash of all paths and labels.
    """

    def __init__(self, options: Options, world: World):
        self.options, self.world, self.seed = options, world, options.meta.seed
        data, o = options.data, options.optimization
        self.train, self.val = train_and_val(
            data, options.data_aug, resolution=o.resolution, seed=self.seed, world=world
        )
        self.lists = split.fingerprint(self.train.paths, self.train.labels, self.val.paths, self.val.labels)
        self.chosen = torch.tensor(split.few_per_class(self.train.labels, data.labels_per_class, self.seed))
        self.global_batch = o.batch_size * world.world_size
        self.steps_per_epoch = -(-len(self.chosen) // self.global_batch)
        self.last_step = o.num_epochs * self.steps_per_epoch
        self.excluded: dict[str, str] = {}
        self._shuffled: tuple[int, Tensor] | None = None

    def check_same_lists(self, kept: dict[str, Any]) -> None:
        """Raises ConfigError where a checkpoint or results.json of the folder was made with other lists."""
        if kept.get("lists", self.lists) != self.lists:  # folders from before the lists were kept have none
            raise ConfigError(
                f"{self.options.folder} holds a run on other videos or labels than data.dataset_train and "
                "data.dataset_val name now; choose another folder=…, or remove that one"
            )

    def steps(self, first: int) -> Iterator[Batch]:
        """This process's part of the steps from `first` to the last."""
        return self.train.steps(
            lambda step: (step // self.steps_per_epoch, self._samples(step)[0]), range(first, self.last_step)
        )

    def slots(self, batch: Batch) -> list[int]:
        """The samples' places in their step, without those that could not be read."""
        samples, first = self._samples(batch.step)
        read = set(batch.indices.tolist())
        return [first + place for place, index in enumerate(samples.tolist()) if index in read]

    def validation(self, indices: Tensor, watchdog: Watchdog) -> Iterator[Batch]:
        """This process's part of the validation videos with these numbers, all processes in step."""
        batches = indices.split(self.global_batch)
        own = [part.tensor_split(self.world.world_size)[self.world.rank] for part in batches]
        for number, batch in enumerate(self.val.batches(own)):
            watchdog.note(f"batch {number + 1} of {len(own)} of {self.val.source}")
            self.count(batch)
            yield batch

    def count(self, batch: Batch) -> int:
        """How many videos all processes have in their parts of a batch; what they could not read is noted."""
        everyone = self.world.all_gather_object((len(batch), {bad.path: bad.reason for bad in batch.bad}))
        for _, unreadable in everyone:
            self.excluded |= unreadable
        return sum(count for count, _ in everyone)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Normalised clips [B, n, C, T, H, W] and labels [B] on the device.

        A process without any has one of zeros with the label IGNORED: gradients are averaged in step.
        """
        data, device, side = self.options.data, self.world.device, self.options.optimization.resolution
        if len(batch) == 0:
            clips = torch.zeros(1, data.num_segments, 3, data.frames_per_clip, side, side, device=device)
            return clips, torch.tensor([IGNORED], device=device)
        x = to_float(batch.clips.to(device), data.normalize_mean, data.normalize_std)
        return rearrange(x, "(B n) C T H W -> B n C T H W", B=len(batch)), batch.labels.to(device)

    def _samples(self, step: int) -> tuple[Tensor, int]:
        """This process's samples of a step, and the first one's place in it. Pairs that are mixed are not parted."""
        epoch, number = divmod(step, self.steps_per_epoch)
        batch = self._order(epoch)[number * self.global_batch : (number + 1) * self.global_batch]
        unit = 2 if self.options.optimization.mixes else 1
        units = torch.arange(-(-len(batch) // unit)).tensor_split(self.world.world_size)[self.world.rank]
        first = unit * int(units[0]) if len(units) else 0
        return batch[first : first + unit * len(units)], first

    def _order(self, epoch: int) -> Tensor:
        """The samples of an epoch, shuffled; kept until another epoch is asked for."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            places = torch.randperm(len(self.chosen), generator=generator(self.seed, "order", epoch))
            self._shuffled = epoch, self.chosen[places]
        return self._shuffled[1]
