"""Train a grid of heads on frozen features, and go on exactly where a run was stopped."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from tubelet.config import ConfigError
from tubelet.probing import heads as reading
from tubelet.probing.features import Features
from tubelet.probing.options import ProbeOptimizationConfig
from tubelet.runtime import checkpoint
from tubelet.runtime.parallelize import DistributedConfig, parallelize
from tubelet.runtime.progress import progress
from tubelet.runtime.seeds import generator
from tubelet.training.optimizer import adamw, set_hyperparameters


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Trained heads, with the mean loss and accuracy (percent) of each [G] over the last epoch of training."""

    heads: reading.Heads
    train_loss: list[float]
    train_top1: list[float]


@dataclasses.dataclass
class _Progress:
    """Steps taken, and over those of the epoch so far, of all processes: each head's sums of losses and hits [2, G],
    and the samples."""

    step: int
    sums: Tensor
    seen: int = 0


@dataclasses.dataclass(frozen=True)
class Fitter:
    """What the fits of one probe share.

    make_head: a new head. global_batch: videos of a step of all processes. inputs: hash of all that a result depends
    on; a checkpoint made with other inputs is refused.
    """

    options: ProbeOptimizationConfig
    features: Features
    make_head: Callable[[], nn.Module]
    seed: int
    folder: Path
    global_batch: int
    inputs: str
    save_every_minutes: float

    def fit(
        self,
        stage: str,
        grid: list[tuple[float, float]],
        indices: Tensor,
        on_epoch: Callable[[int, list[float]], None] = lambda epoch, losses: None,
    ) -> Fitted:
        """A head for each (lr, weight_decay) of `grid`, trained on the samples `indices`.

        stage: name of the fit, for its checkpoints and its progress bar. on_epoch gets the epochs done and the heads'
        losses.
        """
        o, world = self.options, self.features.world
        device = self.features.encoder.device
        heads = reading.build(self.make_head, len(grid), self.seed).to(device)
        model = parallelize(heads, [], DistributedConfig(), world, torch.float32)
        optimizers = [
            adamw([head], lr=lr, weight_decay=weight_decay)
            for head, (lr, weight_decay) in zip(heads.heads, grid, strict=True)
        ]
        now = self._resume(stage, heads, optimizers)
        steps, epochs = self._steps_per_epoch(len(indices)), self.epochs(len(indices))
        saved = time.monotonic()
        name = f"{self.folder.parent.name}/{self.folder.name}, {stage}"
        bar = progress(desc=name, total=epochs * steps, initial=now.step, unit="step", off=not world.is_main)
        for epoch in range(now.step // steps, epochs):
            order = indices[torch.randperm(len(indices), generator=generator(self.seed, "order", epoch))]
            batches = order.split(self.global_batch)[now.step - epoch * steps :]
            if len(batches) == steps:
                now.sums, now.seen = torch.zeros_like(now.sums), 0
            for batch in self.features.batches(batches, epoch):
                _set_rates(optimizers, grid, o.learning_rate(now.step, steps, epochs * steps) / o.lr)
                if batch.of_all:
                    logits = self.read_out(model, batch.tokens)
                    loss = reading.loss(logits, batch.labels)
                    # Gradients are the processes' mean: each counts by its share of the samples.
                    (loss.sum() * (len(batch) * world.world_size / batch.of_all)).backward()
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
                    hits = (reading.probabilities(logits.detach()).argmax(-1) == batch.labels).sum(1)
                    now.sums += world.sum(torch.stack([loss.detach() * len(batch), hits]))
                    now.seen += batch.of_all
                now.step += 1
                if now.step % steps == 0:
                    losses = (now.sums[0] / max(1, now.seen)).tolist()
                    on_epoch(epoch + 1, losses)
                    bar.set_postfix_str(f"loss {min(losses):.3f}", refresh=False)
                bar.update()
                if now.step == epochs * steps or time.monotonic() - saved > 60 * self.save_every_minutes:
                    self._save(stage, now, heads, optimizers)
                    saved = time.monotonic()
        bar.close()
        losses, hits = (now.sums / max(1, now.seen)).tolist()
        return Fitted(heads.eval(), losses, [100 * share for share in hits])

    def epochs_done(self, stage: str, num_samples: int) -> int:
        """How many epochs of `stage`, on so many samples, an earlier run has saved."""
        saved = checkpoint.found(self._checkpoints(stage))
        return int(saved[-1].stem.removeprefix("step-")) // self._steps_per_epoch(num_samples) if saved else 0

    def epochs(self, num_samples: int) -> int:
        """How many epochs a fit on so many samples takes."""
        return self.options.epochs_of(self._steps_per_epoch(num_samples))

    def read_out(self, heads: nn.Module, tokens: Tensor) -> Tensor:
        """Logits [G, B, P, num_classes] of tokens [B, segments, views, N, D]."""
        dtype = self.features.encoder.dtype
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            return reading.read_out(heads, tokens, self.options.attend_across_segments)

    def _steps_per_epoch(self, num_samples: int) -> int:
        return -(-num_samples // self.global_batch)

    def _checkpoints(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage

    def _save(self, stage: str, now: _Progress, heads: nn.Module, optimizers: list) -> None:
        if not self.features.world.is_main:
            return
        state = {
            **dataclasses.asdict(now),
            "heads": heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "excluded": self.features.excluded,
            "global_batch": self.global_batch,
            "inputs": self.inputs,
        }
        checkpoint.save(self._checkpoints(stage), now.step, state, keep=1)

    def _resume(self, stage: str, heads: nn.Module, optimizers: list) -> _Progress:
        folder = self._checkpoints(stage)
        path = self.features.world.broadcast_from_rank0(lambda: checkpoint.newest(folder))
        device = self.features.encoder.device
        if path is None:
            return _Progress(0, torch.zeros(2, len(optimizers), device=device))
        state = checkpoint.read(path)
        checkpoint.check_same_batch_size(state["global_batch"], self.global_batch, "optimization.batch_size")
        if state["inputs"] != self.inputs:
            raise other_inputs(self.folder)
        checkpoint.load_state(heads, state["heads"], str(folder))
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.features.excluded.update(state["excluded"])
        return _Progress(state["step"], state["sums"].to(device), state["seen"])


def other_inputs(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder} holds a probe of other weights or labels; choose another folder=…, or remove that one"
    )


def _set_rates(optimizers: list[torch.optim.Optimizer], grid: list[tuple[float, float]], share: float) -> None:
    """Warm-up and cosine for each head; `start_lr` and `final_lr` stand in their ratio to `lr`."""
    for optimizer, (lr, weight_decay) in zip(optimizers, grid, strict=True):
        set_hyperparameters(optimizer, lr=lr * share, weight_decay=weight_decay)
