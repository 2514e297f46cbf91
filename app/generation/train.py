"""Prediction of future frames: `python -m app.main --fname configs/generation/<name>.yaml`."""

import logging
from typing import Any

import torch
from torch import nn

from app.generation.evaluation import HeldOutClips, HeldOutError, check_evaluation, evaluate
from app.generation.options import Options
from tubelet.config import ConfigError, naming
from tubelet.config.registry import find
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.generation.feature_decoder import build_feature_decoder
from tubelet.generation.frame_predictor import build_frame_predictor
from tubelet.generation.latent_video import LatentVideoModel
from tubelet.objectives.frame_prediction import FramePrediction
from tubelet.objectives.latent_prediction import LatentPrediction
from tubelet.runtime.distributed import World
from tubelet.runtime.seeds import seed_for
from tubelet.training.callbacks import Callback, Evaluation
from tubelet.training.fit import fit
from tubelet.training.objective import Objective
from tubelet.training.schedules import Schedule
from tubelet.training.trainer import Trainer

logger = logging.getLogger(__name__)


def main(options: Options, world: World) -> None:
    """Train to the last step, or continue the run in the folder; then measure and draw predictions."""
    data, seed = options.data, options.meta.seed
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
    model: Any = trainer.objective.model
    fit(trainer, dataset, stream, data, monitor(options, model, world), pin_memory=data.pin_mem)
    evaluate(model, held_out, options, world)


def monitor(options: Options, model: nn.Module, world: World) -> list[Callback]:
    """Return the measurement of the error on a few test clips during training, unless it is off or fails."""
    if not world.is_main or options.logging.monitor_clips == 0:
        return []
    try:
        error = HeldOutError(options, world.device)
    except ConfigError as unreadable:
        logger.warning("logging.monitor_clips: the error is not measured during training; %s", unreadable)
        return []
    return [Evaluation("test_mse", lambda: error.measure(model))]


def make_trainer(options: Options, world: World) -> Trainer:
    """Build the model, with initial weights that depend on the seed alone, and its trainer."""
    data, o = options.data, options.optimization
    torch.manual_seed(seed_for(options.meta.seed, "initialisation"))
    model: Any = build_model(options)
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
    assert options.encoder is not None
    return build_frame_predictor(
        options.encoder,
        data.clip,
        channels=data.channels,
        num_target_frames=data.num_target_frames,
        mean=data.normalize_mean,
        std=data.normalize_std,
    )
