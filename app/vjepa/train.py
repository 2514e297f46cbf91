"""Self-supervised pretraining: `python -m app.main --fname configs/pretrain/<name>.yaml`."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.vjepa.options import Options, Schedule
from tubelet import hub, report
from tubelet.config import ConfigError
from tubelet.config.registry import find
from tubelet.data import Batch, Draw, evenly_spaced, to_float
from tubelet.data.bad_files import BadFiles
from tubelet.data.loader import collate, make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.models import build_encoder, build_predictor
from tubelet.models.jepa import JEPA
from tubelet.models.video_encoder import VideoEncoder
from tubelet.runtime import checkpoint, parallelize
from tubelet.runtime.distributed import World
from tubelet.runtime.seeds import seed_for
from tubelet.runtime.signals import SignalHandler
from tubelet.training.bookkeeping import Bookkeeping
from tubelet.training.monitor import FeatureMonitor
from tubelet.training.optimizer import adamw, set_hyperparameters
from tubelet.training.updates import Updates

PARTS = ("encoder", "target_encoder", "predictor")
# Keys that may differ when a folder's run is continued: nothing that is learned depends on them.
FREE = (
    "folder",
    "logging.",
    "distributed.",
    "data.batch_size",  # that of all processes together may not: see Pretraining.load
    "data.num_workers",
    "data.pin_mem",
    "data.worker_timeout",
    "data.max_bad_share",
    "data.cache",
    "meta.load_checkpoint",
)


def main(options: Options, world: World) -> None:
    """Train until the last epoch; a folder that holds this run already is continued where it stopped."""
    options.check_clip_size(world.world_size)
    folder, data, seed = Path(options.folder), options.data, options.meta.seed
    dataset = find("data", data.dataset_type).Dataset(
        data, TrainTransform(options.data_aug, data.crop_size), seed=seed, on_error="replace"
    )
    stream = SampleStream(dataset.sizes, data.datasets_weights, data.batch_size * world.world_size, seed)
    schedule = Schedule(options.optimization, steps_per_epoch=max(1, stream.pass_length // stream.batch_size))
    training = Pretraining(options, schedule, world)
    training.resume_or_start(folder / "checkpoints")
    batches = make_train_loader(
        dataset,
        stream,
        options.mask_collator(),
        seed=seed,
        first_step=training.step,
        last_step=schedule.steps,
        mask_batch_size=data.mask_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=data.num_workers,
        pin_memory=data.pin_mem and world.device.type == "cuda",
        timeout=data.worker_timeout,
    )
    book = Bookkeeping(
        options,
        options.logging,
        folder,
        training,
        last_step=schedule.steps,
        free=FREE,
        bad_files=BadFiles(folder / "bad_files.txt", data.max_bad_share),
        monitor=feature_monitor(options, world) if world.is_main or training.sharded else None,
        world=world,
        sharded=training.sharded,
        timeout=options.distributed.timeout,
    )
    with SignalHandler() as interruption, book:
        book.look_at_features(training.jepa.target_encoder)
        for batch, data_seconds in book.with_waiting_time(batches):
            hyperparameters = training.set_hyperparameters()
            losses = training.forward_backward(batch)
            grad_norm = training.update()
            book.note_step(batch, {**hyperparameters, "data_seconds": data_seconds}, {**losses, "grad_norm": grad_norm})
            book.look_at_features(training.jepa.target_encoder)
            book.write_log_if_due()
            book.save_if_due(interruption.signal)
    if world.is_main:
        report.write(folder)


class Pretraining:
    """What a checkpoint holds, and how one step changes it."""

    def __init__(self, options: Options, schedule: Schedule, world: World):
        self.options, self.schedule, self.world = options, schedule, world
        self.step = 0
        self.global_batch = options.data.batch_size * world.world_size
        torch.manual_seed(seed_for(options.meta.seed, "initialisation"))
        self.jepa = build_jepa(options).to(world.device)
        if options.meta.compile:
            for part in PARTS:
                getattr(self.jepa, part).compile()
        parts = [getattr(self.jepa, part) for part in PARTS]
        self.model = parallelize.parallelize(self.jepa, parts, options.distributed, world, options.dtype)
        self.sharded = parallelize.is_sharded(self.model)
        self.optimizer = adamw(
            [self.jepa.encoder, self.jepa.predictor],
            lr=schedule.lr(0),
            weight_decay=schedule.weight_decay(0),
            betas=options.optimization.betas,
            eps=options.optimization.eps,
        )
        self.updates = Updates(self.optimizer, options.dtype, world.device)

    def set_hyperparameters(self) -> dict[str, float]:
        """Give the optimiser this step's learning rate and weight decay; returns them with the EMA momentum."""
        now = {"lr": self.schedule.lr(self.step), "weight_decay": self.schedule.weight_decay(self.step)}
        set_hyperparameters(self.optimizer, **now)
        return {**now, "momentum": self.schedule.momentum(self.step)}

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the batch's mean loss, part by part; returns the losses, still on the device."""
        seed, rank, parts = self.options.meta.seed, self.world.rank, self.options.optimization.accumulation_steps
        torch.manual_seed(seed_for(seed, self.step, rank, "dropout"))
        batch = batch.to(self.world.device)
        rows = len(batch.clips)
        clip_seeds = [seed_for(seed, self.step, rank * rows + row, "noise") for row in range(rows)]
        losses: dict[str, Tensor] = {}
        for part, chunk in enumerate(torch.arange(rows).chunk(parts)):
            place = slice(int(chunk[0]), int(chunk[-1]) + 1)
            with parallelize.gradient_sync(self.model, now=part == parts - 1):
                terms = self._losses(batch, place, clip_seeds[place])
                self.updates.backward(terms["loss"] / parts)
            for name, term in terms.items():
                losses[name] = losses.get(name, 0) + term.detach() / parts
        return losses

    def update(self) -> Tensor:
        """Clip, step, move the target encoder; an update with non-finite gradients is left out. Returns the norm."""
        grad_norm = self.updates.apply(self.schedule.clip_grad(self.step))
        self.jepa.update_target(self.schedule.momentum(self.step))
        self.step += 1
        return grad_norm

    def state(self) -> dict[str, Any]:
        """Everything that the run needs to go on, as plain data."""
        return {
            "step": self.step,
            **{part: parallelize.model_state(getattr(self.jepa, part)) for part in PARTS},
            "optimizer": parallelize.optimizer_state(self.jepa, self.optimizer),
            "global_batch": self.global_batch,
            "scaler": self.updates.state_dict(),
            "config": self.options.model_dump(mode="json"),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; raises CheckpointError when it does not match the model or the global batch."""
        checkpoint.check_same_batch_size(state["global_batch"], self.global_batch, "data.batch_size")
        for part in PARTS:
            checkpoint.load_state(getattr(self.jepa, part), state[part], f"{part} of the checkpoint")
        parallelize.load_optimizer_state(self.jepa, self.optimizer, state["optimizer"])
        self.updates.load_state_dict(state["scaler"])
        self.step = state["step"]

    def resume_or_start(self, checkpoints: Path) -> None:
        """Go on from the newest checkpoint; a new run starts from `init_from`'s weights where that is given."""
        path = self.world.broadcast_from_rank0(lambda: checkpoint.newest(checkpoints))
        if path is not None and not self.options.meta.load_checkpoint:
            raise ConfigError(
                f"{checkpoints.parent} holds a run; with meta.load_checkpoint=false, choose another folder=…"
            )
        if path is not None:
            shards = self.sharded and path.is_dir()
            self.load(checkpoint.read_shards(path, like=self.state()) if shards else checkpoint.read(path))
        elif self.options.init_from is not None:
            try:
                weights = hub.read_parts(self.options.init_from)
            except checkpoint.CheckpointError as error:
                raise ConfigError(f"init_from: {error}") from None
            if lacking := [part for part in PARTS if part not in weights]:
                raise ConfigError(
                    f"init_from: {self.options.init_from} has no {' and no '.join(lacking)}; give a run of app.vjepa, "
                    "or a checkpoint of V-JEPA"
                )
            for part in PARTS:
                what = f"init_from: {self.options.init_from}: {part}"
                checkpoint.load_state(getattr(self.jepa, part), weights[part], what)

    def _losses(self, batch: Batch, place: slice, clip_seeds: list[int]) -> dict[str, Tensor]:
        aug = self.options.data_aug
        clips = to_float(batch.clips[place], aug.normalize_mean, aug.normalize_std)
        masks_context = [mask[place] for mask in batch.masks_context]
        masks_target = [mask[place] for mask in batch.masks_target]
        with self.updates.autocast():
            return self.model(clips, masks_context, masks_target, clip_seeds)


def build_jepa(options: Options) -> JEPA:
    """The encoder and predictor of the configuration, put together."""
    encoder = build_encoder(options.model, **options.grid())
    if isinstance(encoder, VideoEncoder):
        encoder.tube_masks = options.mask_collator().draws_tubes
    predictor = build_predictor(options.model, encoder, **options.grid(), num_mask_tokens=len(options.mask))
    return JEPA(encoder, predictor, options.loss)


def feature_monitor(options: Options, world: World) -> FeatureMonitor | None:
    """Clips from all over the data, without augmentation, to watch the features by."""
    count, aug = options.logging.monitor_clips, options.data_aug
    if count == 0:
        return None
    centred = options.data.model_copy(update={"num_clips": 1, "random_clip_sampling": False})
    dataset = find("data", centred.dataset_type).Dataset(centred, EvalTransform(centred.crop_size), on_error="exclude")
    places = evenly_spaced(len(dataset), count).tolist()
    clips = collate([dataset[Draw(0, 0, place, slot)] for slot, place in enumerate(places)], step=0)
    return FeatureMonitor(clips, options.data.batch_size, aug.normalize_mean, aug.normalize_std, world.device)
