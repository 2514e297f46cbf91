"""Prediction of future frames: `python -m app.main --fname configs/generation/<name>.yaml`."""

import logging
from pathlib import Path

import torch
from torch import nn

from app.generation.evaluation import HeldOutClips, HeldOutError, check_evaluation, evaluate
from app.generation.options import Options
from tubelet.config import ConfigError, naming
from tubelet.config.registry import find
from tubelet.data.bad_files import BadFiles
from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.generation.feature_decoder import build_feature_decoder
from tubelet.generation.frame_predictor import build_frame_predictor
from tubelet.generation.latent_video import LatentVideoModel
from tubelet.objectives.frame_prediction import FramePrediction
from tubelet.objectives.latent_prediction import LatentPrediction
from tubelet.runtime.distributed import World
from tubelet.runtime.seeds import seed_for
from tubelet.training.callbacks import BadFileCheck, Callback, Evaluation
from tubelet.training.objective import Objective
from tubelet.training.schedules import Schedule
from tubelet.training.trainer import Trainer

logger = logging.getLogger(__name__)


def main(options: Options, world: World) -> None:
    """Train to the last step, or continue the run in the folder; then measure and draw predictions."""
    data, seed, folder = options.data, options.meta.seed, Path(options.folder)
    augment = options.data_aug
    transform = EvalTransform(data.crop_size) if augment is None else TrainTransform(augment, data.crop_size)
    clips = data.clips(data.train, data.num_frames + data.num_target_frames, at_random=True)
    with naming("data.train", instead_of="data.datasets"):
        dataset = find("data", data.format.name).Dataset(clips, transform, seed=seed, on_error="replace")
    stream = SampleStream(dataset.sizes, None, data.batch_size * world.world_size, seed)
    held_out = HeldOutClips(options, options.evaluation.num_clips, data.num_frames + options.num_predicted())
    held_out.first(1)  # fails before training where no test clip can be used
    check_evaluation(options, world)

    trainer = make_trainer(options, world)
    trainer.resume()
    model = trainer.objective.model

    batches = make_train_loader(
        dataset,
        stream,
        masks=None,
        seed=seed,
        first_step=trainer.step,
        last_step=trainer.last_step,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=data.num_workers,
        pin_memory=data.pin_mem and world.device.type == "cuda",
        timeout=data.worker_timeout,
    )
    callbacks: list[Callback] = [BadFileCheck(BadFiles(folder / "bad_files.txt", data.max_bad_fraction, world))]
    if world.is_main and options.logging.monitor_clips > 0:
        try:
            error = HeldOutError(options, world.device)
            callbacks.append(Evaluation("test_mse", lambda: error.measure(model)))
        except ConfigError as unreadable:
            logger.warning("logging.monitor_clips: the error is not measured during training; %s", unreadable)
    trainer.fit(batches, callbacks)
    evaluate(model, held_out, options, world)


def make_trainer(options: Options, world: World) -> Trainer:
    """Build the model, with initial weights that depend on the seed alone, and its trainer."""
    data, o = options.data, options.optimization
    torch.manual_seed(seed_for(options.meta.seed, "initialisation"))
    model = build_model(options)
    objective: Objective
    if isinstance(model, LatentVideoModel):
        objective = LatentPrediction(model, data.num_frames, data.channels)
    else:
        objective = FramePrediction(model, data.num_frames, data.channels, o.loss)
    batch = data.batch_size * world.world_size
    return Trainer(objective, options, Schedule(o, o.steps), world, global_batch=batch)


def build_model(options: Options) -> nn.Module:
    """Build what `encoder`, `pretrain` or `latent` describe: a map from frames seen to the frames that follow."""
    data = options.data
    if options.latent is not None:
        return LatentVideoModel(options.latent, data.channels, data.num_frames, data.num_target_frames)
    if options.pretrain is not None:
        return build_feature_decoder(
            options.pretrain,
            options.decoder,
            data.clip,
            channels=data.channels,
            num_target_frames=data.num_target_frames,
        )
    return build_frame_predictor(
        options.encoder,
        data.clip,
        channels=data.channels,
        num_target_frames=data.num_target_frames,
        mean=data.normalize_mean,
        std=data.normalize_std,
    )
