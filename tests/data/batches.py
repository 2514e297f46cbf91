"""Batches of a data set, as a run loads them."""

from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.runtime.distributed import World


def load(dataset, *, batch_size=2, last=4, workers=0, rank=0, world_size=1, first=0):
    """The batches of steps `first` to `last` - 1 for one process."""
    stream = SampleStream(dataset.sizes, None, batch_size, seed=7)
    return list(
        make_train_loader(
            dataset, stream, None, seed=7, first_step=first, last_step=last, num_workers=workers,
            world=World(rank, world_size),
        )
    )  # fmt: skip
