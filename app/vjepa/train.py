"""Self-supervised pretraining with any objective: `python -m app.main --fname configs/pretrain/<name>.yaml`."""

from collections.abc import Iterable
from pathlib import Path

import torch

from app.vjepa.options import Options
from tubelet import hub, objectives, report
from tubelet.config import ConfigError
from tubelet.config.registry import find
from tubelet.data import NORMALIZATION, Batch
from tubelet.data.bad_files import BadFiles
from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import EvalTransform
from tubelet.data.types import SampleSource
from tubelet.runtime.checkpoint import CheckpointError
from tubelet.runtime.distributed import World
from tubelet.runtime.seeds import seed_for
from tubelet.training.callbacks import BadFileCheck, FeatureStatistics
from tubelet.training.monitor import FeatureMonitor
from tubelet.training.schedules import Schedule
from tubelet.training.trainer import Trainer


def main(options: Options, world: World) -> None:
    """Train the run and its further stages, if any, one after another."""
    runs = options.runs()
    for run in runs:
        run.check_batch_size(world.world_size)
    for run in runs:
        train(run, world)


def train(options: Options, world: World) -> None:
    """Train until the last epoch; continue the run that the folder holds, if any."""
    dataset, stream = make_stream(options, world)
    schedule = options.optimization.schedule(stream.steps_per_pass)

    trainer = make_trainer(options, schedule, world)
    if not trainer.resume() and options.init_from is not None:
        initialize(trainer, options, options.init_from)

    batches = make_batches(options, dataset, stream, world, range(trainer.step, schedule.last_step))
    bad_files = BadFiles(Path(options.folder) / "bad_files.txt", options.data.max_bad_fraction, world)
    callbacks = [
        FeatureStatistics(feature_monitor(options, world), objectives.remedies(options.objective)),
        BadFileCheck(bad_files),
    ]
    trainer.fit(batches, callbacks)
    if world.is_main:
        report.write_or_warn(options.folder)


def make_stream(options: Options, world: World) -> tuple[SampleSource, SampleStream]:
    """Return the data set with its augmentation, and the order in which the run draws from it."""
    data, seed = options.data, options.meta.seed
    dataset = find("data", data.format.name).Dataset(data, options.transform(), seed=seed, on_error="replace")
    stream = SampleStream(
        dataset.sizes,
        data.datasets_weights,
        data.batch_size * world.world_size,
        seed,
        clips_per_sample=data.clips_per_video,
        cumulative_durations=dataset.cumulative_durations if data.weight_by_duration else None,
    )
    return dataset, stream


def make_batches(
    options: Options, dataset: SampleSource, stream: SampleStream, world: World, steps: range
) -> Iterable[Batch]:
    """Return this process's part of the batches of `steps`, with masks."""
    data = options.data
    return make_train_loader(
        dataset,
        stream,
        options.mask_collator(),
        seed=options.meta.seed,
        first_step=steps.start,
        last_step=steps.stop,
        mask_batch_size=data.mask_batch_size,
        mask_lengths=data.mask_lengths,
        world=world,
        num_workers=data.num_workers,
        pin_memory=data.pin_mem and world.device.type == "cuda",
        timeout=data.worker_timeout,
    )


def make_trainer(options: Options, schedule: Schedule, world: World) -> Trainer:
    """Build the objective, with initial weights that depend on the seed alone, and its trainer."""
    torch.manual_seed(seed_for(options.meta.seed, "initialisation"))
    objective = objectives.build(options.objective, options.setup(schedule.length))
    return Trainer(objective, options, schedule, world, global_batch=options.data.batch_size * world.world_size)


def initialize(trainer: Trainer, options: Options, source: str) -> None:
    """Start from the weights of another run or checkpoint (`init_from`)."""
    colors = {name: getattr(options.data_aug, name) for name in NORMALIZATION}
    try:
        trainer.load_weights(hub.read_parts(source, trainer.objective.parts(), colors), source)
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"init_from: {error}") from None


def feature_monitor(options: Options, world: World) -> FeatureMonitor:
    """Return the monitor of the encoder's features, on clips from all over the data without augmentation."""
    data = options.data.model_copy(update={"num_clips": 1, "random_clip_sampling": False})
    transform = EvalTransform(data.crop_size)
    return FeatureMonitor(
        lambda: find("data", data.format.name).Dataset(data, transform, on_error="exclude"),
        num_clips=options.logging.monitor_clips,
        batch_size=data.batch_size,
        mean=options.data_aug.normalize_mean,
        std=options.data_aug.normalize_std,
        world=world,
        dtype=options.dtype_on(world.device),
        num_workers=data.num_workers,
        timeout=data.worker_timeout,
    )
