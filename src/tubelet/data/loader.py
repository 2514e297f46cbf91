"""Loaders of training, from any step on, and of evaluation; batches do not depend on the number of workers."""

from collections.abc import Sequence

from tubelet.data.collate import collate
from tubelet.data.mask_draws import MaskSampler, draw_masks
from tubelet.data.options import MaskLengths
from tubelet.data.streams import SampleStream
from tubelet.data.types import Batch, Draw, SampleSource
from tubelet.data.workers import Loader
from tubelet.runtime.distributed import ONE_PROCESS, World


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
) -> Loader:
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
) -> Loader:
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
