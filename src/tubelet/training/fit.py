"""Train on a data set, from its samples to the last step."""

from collections.abc import Sequence
from typing import Protocol

from tubelet.data.bad_files import BadFiles
from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.data.types import SampleSource
from tubelet.training.callbacks import BadFileCheck, Callback
from tubelet.training.trainer import Trainer


class LoadingOptions(Protocol):
    """The options of a section `data` that say how samples are loaded."""

    @property
    def num_workers(self) -> int: ...

    @property
    def worker_timeout(self) -> int: ...

    @property
    def max_bad_fraction(self) -> float: ...


def fit(
    trainer: Trainer,
    dataset: SampleSource,
    stream: SampleStream,
    options: LoadingOptions,
    callbacks: Sequence[Callback] = (),
    *,
    pin_memory: bool = True,
) -> BadFiles:
    """Train without masks, or continue the run in the folder, to the last step.

    Args:
        trainer: The trainer.
        dataset: The samples.
        stream: The draws of each step.
        options: Section `data` of the options.
        callbacks: Called besides the check of unreadable files.
        pin_memory: Copy batches to pinned memory, if the device is a GPU.

    Returns:
        The unreadable files.
    """
    world = trainer.world
    trainer.resume()
    batches = make_train_loader(
        dataset,
        stream,
        seed=trainer.seed,
        first_step=trainer.step,
        last_step=trainer.last_step,
        world=world,
        num_workers=options.num_workers,
        pin_memory=pin_memory and world.device.type == "cuda",
        timeout=options.worker_timeout,
    )
    bad_files = BadFiles(trainer.folder / "bad_files.txt", options.max_bad_fraction, world)
    trainer.fit(batches, [BadFileCheck(bad_files), *callbacks])
    return bad_files
