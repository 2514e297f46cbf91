"""Supervised training and fine-tuning of an encoder with a head: `python -m app.main --fname <yaml>`.

Data, head, loss and results are those of a probe; here the encoder learns too.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.classification.mixing import PairMixing
from app.classification.model import Classifier
from app.classification.options import Options
from app.classification.videos import Videos
from tubelet.config import ConfigError
from tubelet.data import Batch, evenly_spaced
from tubelet.data.bad_files import BadFiles
from tubelet.probing import heads, results
from tubelet.probing.encoder import with_normalization
from tubelet.runtime import checkpoint, parallelize
from tubelet.runtime.distributed import World
from tubelet.runtime.run_folder import check_same_configuration
from tubelet.runtime.seeds import seed_for
from tubelet.runtime.signals import SignalHandler
from tubelet.runtime.watchdog import Watchdog
from tubelet.training.bookkeeping import Bookkeeping
from tubelet.training.optimizer import adamw, layer_decay, set_hyperparameters
from tubelet.training.updates import Updates

# Keys that may differ when a folder's run is continued: they change nothing that is learned.
FREE = (
    "folder",
    "logging.",
    "distributed.",
    "optimization.batch_size",  # that of all processes together may not: see Training.resume
    "data.num_workers",
    "data.worker_timeout",
    "data.cache",
)


def main(options: Options, world: World) -> None:
    """Train to the last epoch, or continue the folder's run; then validate and write what a probe writes."""
    options = world.broadcast_from_rank0(lambda: with_normalization(options))
    folder, logging = Path(options.folder), options.logging
    world.broadcast_from_rank0(lambda: check_same_configuration(folder, options, FREE))
    videos = Videos(options, world)
    if measured := world.broadcast_from_rank0(lambda: results.read_json(folder / "results.json")):
        videos.check_same_lists(measured)
        return
    training = Training(options, videos, world)
    training.resume(folder / "checkpoints")
    book = Bookkeeping(
        options,
        logging,
        folder,
        training,
        last_step=videos.last_step,
        free=FREE,
        bad_files=BadFiles(folder / "bad_files.txt", max_share=1.0),  # data.on_bad_video says what happens
        monitor=None,
        world=world,
        sharded=False,
        timeout=options.distributed.timeout,
    )
    looked_at = evenly_spaced(len(videos.val), logging.monitor_clips)
    with SignalHandler() as interruption, book:
        for batch, data_seconds in book.with_waiting_time(videos.steps(training.step)):
            lr = training.set_learning_rate()
            measured = training.forward_backward(batch)
            grad_norm = training.update()
            book.note_step(batch, {"lr": lr, "data_seconds": data_seconds}, {**measured, "grad_norm": grad_norm})
            if len(looked_at) and training.step % logging.monitor_every == 0:
                book.log.amend({"val_top1": training.validate(looked_at, book.watchdog).top1[0]})
            book.write_log_if_due()
            book.save_if_due(interruption.signal)
        validated = training.validate(torch.arange(len(videos.val)), book.watchdog)
    if world.is_main:
        write(folder, training, validated)


class Training:
    """What a checkpoint holds, and how one step changes it."""

    def __init__(self, options: Options, videos: Videos, world: World):
        self.options, self.videos, self.world, self.seed = options, videos, world, options.meta.seed
        o, self.step = options.optimization, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, "supervised"))
            self.classifier = Classifier(options).to(world.device)
        if options.meta.compile:
            self.classifier.encoder.compile()
        self.model = parallelize.parallelize(self.classifier, [], options.distributed, world, options.dtype)
        self.mixing = PairMixing(o.mixup, o.cutmix, options.data.num_classes, self.seed) if o.mixes else None
        scales = self._layer_decay() if o.layer_decay < 1 else {}
        self.optimizer = adamw(
            [self.classifier], lr=o.lr, weight_decay=o.weight_decay, betas=o.betas, eps=o.eps, lr_scales=scales
        )
        self.updates = Updates(self.optimizer, options.dtype, world.device)
        self.sums = torch.zeros(3, device=world.device)
        """Over the steps of this epoch and the videos of all processes: losses, hits, videos."""

    def set_learning_rate(self) -> float:
        """Give the optimiser this step's learning rate, and return it."""
        o = self.options.optimization
        lr = o.learning_rate(self.step, self.videos.steps_per_epoch, self.videos.last_step)
        set_hyperparameters(self.optimizer, lr=lr, weight_decay=o.weight_decay)
        return lr

    def forward_backward(self, batch: Batch) -> dict[str, Tensor]:
        """Gradients of the mean loss over the videos of all processes; returns this one's part of loss and hits."""
        o, world = self.options.optimization, self.world
        of_all = self.videos.count(batch)
        clips, labels = self.videos.inputs(batch)
        targets = labels
        if self.mixing is not None and len(batch):
            clips, targets = self.mixing(clips, labels, self.step, self.videos.slots(batch))
        torch.manual_seed(seed_for(self.seed, self.step, world.rank, "dropout"))
        if self.step % self.videos.steps_per_epoch == 0:
            self.sums.zero_()
        loss, hits = torch.zeros((), device=world.device), torch.zeros((), device=world.device)
        places = torch.arange(len(clips)).chunk(o.accumulation_steps)
        for part, place in enumerate(places):
            # Gradients are the processes' mean: each part counts by its share of the videos.
            share = len(place) * world.world_size / max(1, of_all)
            with parallelize.gradient_sync(self.model, now=part == len(places) - 1):
                logits = self._forward(self.model, clips[place])[None]
                part_loss = heads.loss(logits, targets[place], o.label_smoothing).sum() * share
                self.updates.backward(part_loss)
            loss += part_loss.detach()
            hits += (heads.probabilities(logits.detach())[0].argmax(-1) == labels[place]).sum()
        own = torch.stack([loss * of_all / world.world_size, hits, torch.full_like(loss, len(batch))])
        self.sums += world.sum(own)
        return {"loss": loss, "train_top1": 100 * hits * world.world_size / max(1, of_all)}

    def update(self) -> Tensor:
        """Clip the gradients and take a step; an update with non-finite gradients is left out. Returns the norm."""
        grad_norm = self.updates.apply(self.options.optimization.clip_grad)
        self.step += 1
        return grad_norm

    @torch.no_grad()
    def validate(self, indices: Tensor, watchdog: Watchdog) -> results.Validated:
        """The classifier on these validation videos, each of which one process reads."""

        def predictions() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for batch in self.videos.validation(indices, watchdog):
                if len(batch):
                    clips, labels = self.videos.inputs(batch)
                    yield heads.probabilities(self._forward(self.classifier, clips)[None]), labels, batch.indices

        self.classifier.eval()
        num_classes = self.options.data.num_classes
        validated = results.validate(predictions(), num_classes, self.world, self.videos.val.source)
        self.classifier.train()
        return validated

    def state(self) -> dict[str, Any]:
        """Everything that the run needs to go on, as plain data."""
        return {
            "step": self.step,
            "encoder": self.classifier.encoder.state_dict(),
            # What `hub` builds it from, and says of the clips, as of a pretraining.
            "config": {**self.classifier.encoder.built_from, "data_aug": self.options.data.normalization()},
            "classifier": self.classifier.head.heads[0].state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.updates.state_dict(),
            "sums": self.sums,
            "excluded": dict(self.videos.excluded),
            "global_batch": self.videos.global_batch,
            "lists": self.videos.lists,
        }

    def resume(self, checkpoints: Path) -> None:
        """Go on from the newest checkpoint where there is one; CheckpointError where it does not match."""
        path = self.world.broadcast_from_rank0(lambda: checkpoint.newest(checkpoints))
        if path is None:
            return
        state = checkpoint.read(path)
        checkpoint.check_same_batch_size(state["global_batch"], self.videos.global_batch, "optimization.batch_size")
        self.videos.check_same_lists(state)
        checkpoint.load_state(self.classifier.encoder, state["encoder"], f"encoder of {path}")
        checkpoint.load_state(self.classifier.head.heads[0], state["classifier"], f"head of {path}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates.load_state_dict(state["scaler"])
        self.sums = state["sums"].to(self.world.device)
        self.step, self.videos.excluded = state["step"], state["excluded"]

    def _forward(self, model: torch.nn.Module, clips: Tensor) -> Tensor:
        with self.updates.autocast():
            return model(clips)

    def _layer_decay(self) -> dict[torch.nn.Parameter, float]:
        try:
            return layer_decay(self.classifier.encoder, self.options.optimization.layer_decay)
        except ValueError as error:
            raise ConfigError(f"optimization.layer_decay: {error}; set it to 1") from None


def write(folder: Path, training: Training, validated: results.Validated) -> None:
    """`predictions.csv`, `confusion.png` and `results.json`."""
    videos, num_classes = training.videos, training.options.data.num_classes
    results.write_predictions(folder / "predictions.csv", validated, 0, videos.val.paths)
    results.draw_confusion(folder / "confusion.png", validated, 0, num_classes)
    train_loss, train_hits = (training.sums[:2] / training.sums[2].clamp_min(1)).tolist()
    measured = {
        "top1": validated.top1[0],
        "top5": validated.top5[0],
        "train_loss": train_loss,
        "train_top1": 100 * train_hits,
        "num_train": sum(videos.train.paths[i] not in videos.excluded for i in videos.chosen.tolist()),
        "num_val": len(validated.labels),
        "num_classes": num_classes,
        "seed": training.seed,
        "lists": videos.lists,
        "excluded": [{"path": path, "reason": reason} for path, reason in sorted(videos.excluded.items())],
    }
    results.write_json(folder / "results.json", measured)
