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
from tubelet.progress import progress
from tubelet.seeds import generator
from tubelet.training import checkpoint
from tubelet.training.optim import adamw, set_hyperparameters
from tubelet.training.schedules import warmup_cosine


@dataclasses.dataclass(frozen=True)
class Fitted:
    """Trained heads, with the mean loss and accuracy (percent) of each [G] over the last epoch of training."""

    heads: reading.Heads
    train_loss: list[float]
    train_top1: list[float]


@dataclasses.dataclass(frozen=True)
class Fitter:
    """What the fits of one probe share.

    make_head: a new head. inputs: hash of the weights and labels; a checkpoint made with others is refused.
    """

    options: ProbeOptimizationConfig
    features: Features
    make_head: Callable[[], nn.Module]
    seed: int
    folder: Path
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
        o = self.options
        device = self.features.encoder.device
        heads = reading.build(self.make_head, len(grid), self.seed).to(device)
        optimizers = [
            adamw([head], lr=lr, weight_decay=weight_decay)
            for head, (lr, weight_decay) in zip(heads.heads, grid, strict=True)
        ]
        folder = self._checkpoints(stage)
        first, summary = self._resume(folder, heads, optimizers)
        steps = -(-len(indices) // o.batch_size)
        epochs = o.epochs(steps)
        saved = time.monotonic()
        bar = progress(
            desc=f"{self.folder.parent.name}/{self.folder.name}, {stage}", total=epochs, initial=first, unit="epoch"
        )
        for epoch in range(first, epochs):
            order = indices[torch.randperm(len(indices), generator=generator(self.seed, "order", epoch))]
            total = torch.zeros(2, len(grid), device=device)
            seen = 0
            for i, batch in enumerate(self.features.batches(order.split(o.batch_size), epoch)):
                _set_rates(optimizers, grid, o, epoch * steps + i, steps, epochs)
                logits = self.read_out(heads, batch.tokens)
                loss = reading.loss(logits, batch.labels)
                loss.sum().backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                hits = (reading.probabilities(logits.detach()).argmax(-1) == batch.labels).sum(1)
                total += torch.stack([loss.detach() * len(batch.labels), hits])
                seen += len(batch.labels)
            summary = (total / max(1, seen)).cpu()
            on_epoch(epoch + 1, summary[0].tolist())
            bar.set_postfix_str(f"loss {summary[0].min():.3f}", refresh=False)
            bar.update()
            if epoch + 1 == epochs or time.monotonic() - saved > 60 * self.save_every_minutes:
                self._save(folder, epoch + 1, heads, optimizers, summary)
                saved = time.monotonic()
        bar.close()
        return Fitted(heads.eval(), summary[0].tolist(), (100 * summary[1]).tolist())

    def epochs_done(self, stage: str) -> int:
        """How many epochs of `stage` an earlier run has saved."""
        saved = checkpoint.found(self._checkpoints(stage))
        return int(saved[-1].stem.removeprefix("step-")) if saved else 0

    def read_out(self, heads: reading.Heads, tokens: Tensor) -> Tensor:
        """Logits [G, B, P, num_classes] of tokens [B, segments, views, N, D]."""
        dtype = self.features.encoder.dtype
        with torch.autocast(tokens.device.type, dtype, enabled=dtype != torch.float32):
            return reading.read_out(heads, tokens, self.options.attend_across_segments)

    def _checkpoints(self, stage: str) -> Path:
        return self.folder / "checkpoints" / stage

    def _save(self, folder: Path, epoch: int, heads: nn.Module, optimizers: list, summary: Tensor) -> None:
        state = {
            "step": epoch,
            "heads": heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "summary": summary,
            "excluded": self.features.excluded,
            "inputs": self.inputs,
        }
        checkpoint.save(folder, epoch, state, keep=1)

    def _resume(self, folder: Path, heads: nn.Module, optimizers: list) -> tuple[int, Tensor]:
        state = checkpoint.load_latest(folder)
        if state is None:
            return 0, torch.zeros(2, len(optimizers))
        if state["inputs"] != self.inputs:
            raise other_inputs(self.folder)
        checkpoint.load_state(heads, state["heads"], str(folder))
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        self.features.excluded.update(state["excluded"])
        return state["step"], state["summary"]


def other_inputs(folder: Path) -> ConfigError:
    return ConfigError(
        f"{folder} holds a probe of other weights or labels; choose another folder=…, or remove that one"
    )


def _set_rates(
    optimizers: list[torch.optim.Optimizer], grid: list, o: ProbeOptimizationConfig, step: int, steps: int, epochs: int
) -> None:
    """Warm-up and cosine for each head; `start_lr` and `final_lr` stand in their ratio to `lr`."""
    share = warmup_cosine(step, o.warmup * steps, epochs * steps, o.start_lr / o.lr, 1.0, o.final_lr / o.lr)
    for optimizer, (lr, weight_decay) in zip(optimizers, grid, strict=True):
        set_hyperparameters(optimizer, lr=lr * share, weight_decay=weight_decay)
