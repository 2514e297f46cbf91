"""Future-frame prediction: `python -m app.main --fname configs/generation/<name>.yaml`."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.generation.evaluation import HeldOutClips, HeldOutError, evaluate, to_frames
from app.generation.options import Options
from tubelet.config.registry import find
from tubelet.data import Batch
from tubelet.data.bad_files import BadFiles
from tubelet.data.loader import make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.generation.feature_decoder import build_feature_decoder
from tubelet.generation.frame_predictor import build_frame_predictor
from tubelet.probing.encoder import fingerprint
from tubelet.runtime import checkpoint, parallelize
from tubelet.runtime.distributed import World
from tubelet.runtime.seeds import seed_for
from tubelet.runtime.signals import SignalHandler
from tubelet.training.bookkeeping import Bookkeeping
from tubelet.training.optimizer import adamw, set_hyperparameters
from tubelet.training.updates import Updates

# Keys that may differ when a folder's run is continued: nothing that is learned depends on them.
FREE = (
    "folder",
    "logging.",
    "evaluation.",
    "distributed.",
    "data.test",
    "data.batch_size",  # that of all processes together may not: see Training.load
    "data.num_workers",
    "data.pin_mem",
    "data.worker_timeout",
    "data.max_bad_share",
    "data.cache",
    "pretrain.folder",  # its weights may not: see Training.load
    "pretrain.checkpoint",
)


def main(options: Options, world: World) -> None:
    """Train to the last step, or go on where the folder's run stopped; then measure and draw what is predicted."""
    folder, data, seed, steps = Path(options.folder), options.data, options.meta.seed, options.optimization.steps
    augment = options.data_aug
    transform = EvalTransform(data.crop_size) if augment is None else TrainTransform(augment, data.crop_size)
    clips = data.clips(data.train, data.num_frames + data.num_target_frames, at_random=True)
    dataset = find("data", data.dataset_type).Dataset(clips, transform, seed=seed, on_error="replace")
    stream = SampleStream(dataset.sizes, None, data.batch_size * world.world_size, seed)
    held_out = HeldOutClips(options, options.evaluation.num_clips, data.num_frames + options.frames_ahead())
    held_out.first(1)  # that none can be used shall be known before training
    watched = world.is_main and options.logging.monitor_clips > 0
    error_on_test = HeldOutError(options, world.device) if watched else None
    looks_at = {*range(0, steps, options.logging.monitor_every), steps}
    training = Training(options, world)
    training.resume(folder / "checkpoints")
    batches = make_train_loader(
        dataset,
        stream,
        masks=None,
        seed=seed,
        first_step=training.step,
        last_step=steps,
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
        last_step=steps,
        free=FREE,
        bad_files=BadFiles(folder / "bad_files.txt", data.max_bad_share),
        monitor=None,
        world=world,
        sharded=False,
        timeout=options.distributed.timeout,
    )
    with SignalHandler() as interruption, book:
        for batch, data_seconds in book.with_waiting_time(batches):
            lr = training.set_learning_rate()
            loss = training.forward_backward(batch)
            grad_norm = training.update()
            book.note_step(batch, {"lr": lr, "data_seconds": data_seconds}, {"loss": loss, "grad_norm": grad_norm})
            if error_on_test is not None and training.step in looks_at:
                book.log.amend({"test_mse": error_on_test.measure(training.model)})
            book.write_log_if_due()
            book.save_if_due(interruption.signal)
    evaluate(training.model, held_out, options, world)


class Training:
    """What a checkpoint holds, and how one step changes it."""

    def __init__(self, options: Options, world: World):
        self.options, self.world = options, world
        self.step = 0
        self.global_batch = options.data.batch_size * world.world_size
        torch.manual_seed(seed_for(options.meta.seed, "initialisation"))
        self.model = build_model(options).to(world.device)
        self.trained = self.model.trained()
        if options.meta.compile:
            self.trained.compile()
        self.replica = parallelize.parallelize(self.model, [self.trained], options.distributed, world, options.dtype)
        o = options.optimization
        self.optimizer = adamw([self.trained], lr=o.lr, weight_decay=o.weight_decay, betas=o.betas)
        self.updates = Updates(self.optimizer, options.dtype, world.device)

    def set_learning_rate(self) -> float:
        """Give the optimiser this step's learning rate, and return it."""
        lr = self.options.optimization.learning_rate(self.step, 1, self.options.optimization.steps)
        set_hyperparameters(self.optimizer, lr=lr, weight_decay=self.options.optimization.weight_decay)
        return lr

    def forward_backward(self, batch: Batch) -> Tensor:
        """Gradients of the mean error over the frames to come; returns it, still on the device."""
        torch.manual_seed(seed_for(self.options.meta.seed, self.step, self.world.rank, "dropout"))
        frames = to_frames(batch, self.options, self.world.device)
        seen, future = frames[:, :, : self.options.data.num_frames], frames[:, :, self.options.data.num_frames :]
        with self.updates.autocast():
            predicted = self.replica(seen, future)
        error = {"l1": F.l1_loss, "l2": F.mse_loss}[self.options.optimization.loss]
        loss = error(predicted.float(), future)
        self.updates.backward(loss)
        return loss.detach()

    def update(self) -> Tensor:
        """Clip the gradients and take a step; returns their norm."""
        self.step += 1
        return self.updates.apply(self.options.optimization.clip_grad)

    def state(self) -> dict[str, Any]:
        """Everything that the run needs to go on; what a pretraining left frozen is only recognised again."""
        return {
            "step": self.step,
            "model": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.updates.state_dict(),
            "global_batch": self.global_batch,
            "frozen": self._frozen(),
            "config": self.options.model_dump(mode="json"),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint; raises CheckpointError when it does not match the model or the global batch."""
        checkpoint.check_same_batch_size(state["global_batch"], self.global_batch, "data.batch_size")
        if state["frozen"] != self._frozen():
            raise checkpoint.CheckpointError(
                "pretrain.folder holds other weights than when this run began; name the checkpoint of then with "
                "pretrain.checkpoint=…, or choose another folder=…"
            )
        checkpoint.load_state(self.trained, state["model"], "model of the checkpoint")
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates.load_state_dict(state["scaler"])
        self.step = state["step"]

    def resume(self, checkpoints: Path) -> None:
        """Go on from the newest checkpoint where there is one."""
        path = self.world.broadcast_from_rank0(lambda: checkpoint.newest(checkpoints))
        if path is not None:
            self.load(checkpoint.read(path))

    def _frozen(self) -> str | None:
        frozen = getattr(self.model, "frozen", None)
        return None if frozen is None else fingerprint(frozen)


def build_model(options: Options) -> nn.Module:
    """What `model` or `pretrain` asks for: frames seen -> frames to come."""
    data = options.data
    if options.pretrain is not None:
        return build_feature_decoder(
            options.pretrain,
            options.decoder,
            channels=data.channels,
            sizes=data.sizes(),
            num_target_frames=data.num_target_frames,
        )
    return build_frame_predictor(
        options.model,
        **data.sizes(),
        channels=data.channels,
        num_target_frames=data.num_target_frames,
        mean=data.normalize_mean,
        std=data.normalize_std,
    )
