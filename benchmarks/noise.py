"""Training steps of any pretraining configuration on noise: real batches, masks and trainer, without video files."""

from collections.abc import Iterator

import numpy as np
import torch

from app.vjepa import train
from app.vjepa.options import Options
from tubelet.data.streams import SampleStream
from tubelet.data.types import Batch, Draw, Sample
from tubelet.runtime.distributed import World
from tubelet.runtime.launch import Package, load
from tubelet.runtime.seeds import seed_for
from tubelet.training.trainer import Trainer

PRETRAINING = Package("app", key="app", module="train")
STEPS_PER_EPOCH = 300  # of schedules that depend on the size of the data set


class NoiseClips:
    """Data set of clips of uniform noise, with the views of the objective; clip i is always the same."""

    unreadable: dict[int, str] = {}

    def __init__(self, options: Options, length: int):
        self.data, self.length, self.transform = options.data, length, options.transform()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, draw: Draw) -> Sample:
        rng = np.random.default_rng(seed_for("noise", draw.index))
        shape = self.data.clip_shape
        frames = rng.integers(0, 256, (shape.num_frames, shape.height, shape.width, 3), dtype=np.uint8)
        clips = [self.transform(frames, rng) for _ in range(self.data.num_clips)]
        views = [clip if isinstance(clip, dict) else {"clip": clip} for clip in clips]
        joined = {name: torch.cat([view[name] for view in views]) for name in views[0]}
        numbers = torch.arange(shape.num_frames).expand(self.data.num_clips, -1)
        return Sample(joined, {"label": draw.index % 8}, draw.index, f"noise {draw.index}", numbers)


def read_options(fname: str, overrides: list[str], folder: str) -> Options:
    """Read a pretraining configuration. Raises ConfigError where it is invalid or configures another program."""
    options = load(PRETRAINING, fname, [*overrides, f"folder={folder}"]).options
    if not isinstance(options, Options):
        raise ValueError(f"{fname}: app: expected a pretraining (app: vjepa), not {type(options).__module__}")
    return options


def make_trainer(options: Options, world: World) -> Trainer:
    """Build the trainer of a run whose epochs have 300 steps, if the configuration does not say how many."""
    return train.make_trainer(options, options.optimization.schedule(STEPS_PER_EPOCH), world)


def batches(options: Options, world: World, steps: int) -> Iterator[Batch]:
    """Yield this process's part of the batches of the first `steps` steps, pinned where the device is a GPU."""
    per_step = options.data.batch_size * world.world_size
    dataset = NoiseClips(options, per_step)
    stream = SampleStream([per_step], None, per_step, options.meta.seed)
    in_this_process = options.data.model_copy(update={"num_workers": 0})
    options = options.model_copy(update={"data": in_this_process})
    yield from train.make_batches(options, dataset, stream, world, range(steps))
