"""Train a grid of heads on frozen features, and continue exactly where a run was stopped."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.config import ConfigError, UserError
from tubelet.probing import heads as ensemble
from tubelet.probing.features import Features
from tubelet.probing.options import ProbeOptimizationConfig
from tubelet.runtime import checkpoint
from tubelet.runtime.parallelize import DistributedConfig, parallelize
from tubelet.runtime.precision import autocast
from tubelet.runtime.progress import progress
from tubelet.runtime.seeds import torch_generator
from tubelet.training.optimizer import adamw, set_hyperparameters

Settings = dict[str, Any]
"""What tells one head of a grid from another: `lr` and `weight_decay`, or an option of the head."""

OnEpoch = Callable[[int, list[float]], None]
"""Called with the number of epochs done and the heads' losses."""


class HeadsDiverged(UserError):
    """No head has a finite loss. The message says what to do."""

    def __init__(self, folder: Path, when: str):
        super().__init__(
            f"{folder}: no head has a finite loss {when}. Lower optimization.lr (or optimization.heads.lr) and choose "
            "another folder=…. If that does not help, the encoder's features are not finite: set "
            "optimization.use_bfloat16=false, or check its weights"
        )


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Trained heads.

    Attributes:
        heads: G heads.
        figures: Of each head, the means over the last epoch of training: `train_loss` and `train_top1`, in percent.
            Empty for heads that are not trained by gradient descent.
    """

    heads: ensemble.Heads
    figures: list[dict[str, float]]


@dataclasses.dataclass
class _Progress:
    """Position in a fit.

    Attributes:
        step: Steps taken.
        sums: [2, G], the sums of loss and of correct predictions of each head, in this epoch, over all processes.
        seen: Samples of this epoch so far, of all processes.
    """

    step: int
    sums: Tensor
    seen: int = 0


@dataclasses.dataclass(frozen=True)
class Fitter:
    """Fits heads of one probe on different subsets of its training videos.

    Step i, counted from 0, uses position i + 1 of the learning-rate schedule, as in V-JEPA, which advances the schedule
    before each step.

    Attributes:
        options: Section `optimization`.
        features: Features of the training videos.
        make_head: Returns a new head.
        seed: Seed of the heads and of the order of samples.
        folder: The probe's folder.
        global_batch: Videos of a step of all processes.
        inputs: Hash of everything that a result depends on besides the options; a checkpoint that was made with other
            inputs is refused.
        save_every_minutes: Interval between checkpoints.
    """

    options: ProbeOptimizationConfig
    features: Features
    make_head: Callable[[], ensemble.Head]
    seed: int
    folder: Path
    global_batch: int
    inputs: str
    save_every_minutes: float

    def fit(
        self,
        stage: str,
        grid: list[Settings],
        indices: Tensor,
        on_epoch: OnEpoch = lambda epoch, losses: None,
    ) -> Fitted:
        """Train a head for each `lr` and `weight_decay` of `grid` on the samples `indices`.

        Args:
            stage: Name of the fit, for its checkpoints and its progress bar.
            grid: Settings of each head.
            indices: int64 [n].
            on_epoch: Called after each epoch.

        Raises:
            HeadsDiverged: The losses of all heads are not finite.
        """
        o, world = self.options, self.features.world
        device = self.features.encoder.device
        heads = ensemble.build(self.make_head, len(grid), self.seed).to(device)
        model = parallelize(heads, [], DistributedConfig(), world, torch.float32)
        optimizers = [adamw([head], **settings) for head, settings in zip(heads.heads, grid, strict=True)]
        now = self._resume(stage, heads, optimizers)
        steps, epochs = self._steps_per_epoch(len(indices)), self.epochs(len(indices))
        saved = time.monotonic()
        name = f"{self.folder.parent.name}/{self.folder.name}, {stage}"
        bar = progress(desc=name, total=epochs * steps, initial=now.step, unit="step", off=not world.is_main)
        for epoch in range(now.step // steps, epochs):
            order = indices[torch.randperm(len(indices), generator=torch_generator(self.seed, "order", epoch))]
            batches = order.split(self.global_batch)[now.step - epoch * steps :]
            if len(batches) == steps:
                now.sums, now.seen = torch.zeros_like(now.sums), 0
            for batch in self.features.batches(batches, epoch):
                _set_rates(optimizers, grid, o.learning_rate(now.step + 1, steps, epochs * steps) / o.lr)
                if batch.num_global:
                    logits = read_out(model, batch.tokens, self.features.encoder.dtype, o.attend_across_segments)
                    loss = ensemble.loss(logits, batch.labels)
                    # Gradients are averaged over processes: each counts by its fraction of the samples.
                    (loss.sum() * (len(batch) * world.world_size / batch.num_global)).backward()
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                    correct = (ensemble.probabilities(logits.detach()).argmax(-1) == batch.labels).sum(1)
                    now.sums += world.sum(torch.stack([loss.detach() * len(batch), correct]))
                    now.seen += batch.num_global
                now.step += 1
                if now.step % steps == 0:
                    losses = (now.sums[0] / max(1, now.seen)).tolist()
                    self._check_any_finite(losses, f"after epoch {epoch + 1} of {epochs}")
                    on_epoch(epoch + 1, losses)
                    bar.set_postfix_str(f"loss {min(filter(math.isfinite, losses)):.3f}", refresh=False)
                bar.update()
                if now.step == epochs * steps or time.monotonic() - saved > 60 * self.save_every_minutes:
                    self._save(stage, now, heads, optimizers)
                    saved = time.monotonic()
        bar.close()
        losses, correct = (now.sums / max(1, now.seen)).tolist()
        figures = [
            {"train_loss": loss, "train_top1": 100 * fraction} for loss, fraction in zip(losses, correct, strict=True)
        ]
        return Fitted(heads.eval(), figures)

    def epochs_done(self, stage: str, num_samples: int) -> int:
        """Number of epochs of `stage`, on so many samples, that an earlier run has saved."""
        saved = checkpoint.find(self._checkpoints(stage))
        return checkpoint.step_of(saved[-1]) // self._steps_per_epoch(num_samples) if saved else 0

    def epochs(self, num_samples: int) -> int:
        """Number of epochs of a fit on so many samples."""
        return self.options.epochs_of(self._steps_per_epoch(num_samples))

    def _check_any_finite(self, losses: list[float], when: str) -> None:
        if not any(math.isfinite(loss) for loss in losses):
            raise HeadsDiverged(self.folder, when)

    def _steps_per_epoch(self, num_samples: int) -> int:
        return -(-num_samples // self.global_batch)

    def _checkpoints(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage

    def _save(self, stage: str, now: _Progress, heads: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if not self.features.world.is_main:
            return
        state = checkpoint.CheckpointState(
            {"heads": heads.state_dict()},
            {"optimizers": [optimizer.state_dict() for optimizer in optimizers]},
            {
                # JSON has no NaN; the sums of a head that has diverged are null.
                "sums": [[x if math.isfinite(x) else None for x in of_heads] for of_heads in now.sums.tolist()],
                "seen": now.seen,
                "excluded": self.features.excluded,
                "global_batch": self.global_batch,
                "inputs": self.inputs,
            },
        )
        checkpoint.save(self._checkpoints(stage), now.step, state, keep=1)

    def _resume(self, stage: str, heads: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> _Progress:
        folder = self._checkpoints(stage)
        path = self.features.world.broadcast_from_rank0(lambda: checkpoint.newest(folder))
        device = self.features.encoder.device
        if path is None:
            return _Progress(0, torch.zeros(2, len(optimizers), device=device))
        metadata = checkpoint.read_metadata(path)
        checkpoint.check_same_batch_size(metadata, self.global_batch, "optimization.batch_size")
        if metadata["inputs"] != self.inputs:
            raise other_inputs(self.folder)
        state = checkpoint.read(path)
        checkpoint.load_weights(heads, state.weights["heads"], f"heads of {path}")
        if state.optimizer is None:
            raise checkpoint.CheckpointError(f"{path}: it has no optimizer state, so the probe cannot be continued")
        for optimizer, stored in zip(optimizers, state.optimizer["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.features.excluded.update(metadata["excluded"])
        sums = [[math.nan if x is None else x for x in of_heads] for of_heads in metadata["sums"]]
        return _Progress(metadata["step"], torch.tensor(sums, device=device), metadata["seen"])


def read_out(heads: nn.Module, tokens: Tensor, dtype: torch.dtype, attend_across_segments: bool) -> Tensor:
    """Return the logits of `heads.read_out`, computed in `dtype`."""
    with autocast(tokens.device, dtype):
        return ensemble.read_out(heads, tokens, attend_across_segments)


def other_inputs(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder} holds a probe of other weights or labels, or of another version of Tubelet; choose another "
        "folder=…, or remove that one"
    )


def _set_rates(optimizers: Sequence[torch.optim.Optimizer], grid: list[Settings], factor: float) -> None:
    """Scale the learning rate of each head: `start_lr` and `final_lr` keep their ratio to `lr`."""
    for optimizer, settings in zip(optimizers, grid, strict=True):
        set_hyperparameters(optimizer, lr=settings["lr"] * factor, weight_decay=settings["weight_decay"])
