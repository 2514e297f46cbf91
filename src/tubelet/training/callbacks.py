"""Callbacks of the trainer: log, progress bar, feature statistics, evaluation, checkpoints, stopping."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tubelet.config import UserError
from tubelet.data import Batch
from tubelet.data.bad_files import BadFiles, NoReplacement
from tubelet.runtime.progress import progress
from tubelet.runtime.run_folder import RunFolder, read_log
from tubelet.training.collapse import CollapseDetector, Measurement, Remedies
from tubelet.training.loggers import make_loggers
from tubelet.training.monitor import FeatureMonitor

if TYPE_CHECKING:
    from tubelet.training.trainer import Trainer

logger = logging.getLogger(__name__)

Metrics = dict[str, "float | Tensor"]


class RunStopped(UserError):
    """The run has to stop; raised by all processes at the same step. The message says what to do."""


class Callback:
    """Base class: every process calls every method, in the order in which the callbacks are listed."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Called before the first step of this start of the run."""

    def on_step_end(self, trainer: Trainer, batch: Batch, metrics: Metrics) -> None:
        """Called after each step; `trainer.step` counts it already."""

    def on_stop(self, trainer: Trainer, error: Exception) -> None:
        """Called when a run ends early with a checkpoint, by the processes in which the error is raised."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Called at the end, also after an error."""


def is_due(trainer: Trainer, every: int) -> bool:
    """Whether an action that comes every `every` steps, and after the last one, comes now."""
    return trainer.step % every == 0 or trainer.step == trainer.last_step


class FeatureStatistics(Callback):
    """Logs statistics of the features every `logging.monitor_every` steps, and reports collapse.

    A run is most likely to collapse early, so the first interval has three measurements more.

    Args:
        monitor: Measures the features of the objective's first encoder.
        remedies: What to change when the features collapse, for the warning.
    """

    def __init__(self, monitor: FeatureMonitor, remedies: Remedies = ()):
        self.monitor, self.remedies = monitor, remedies
        self.loss_sum: Tensor | float = 0.0
        self.steps = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        self.detector = CollapseDetector(self.remedies, trainer.objective.fixed_targets)
        losses = self.detector.restore(read_log(trainer.folder))
        self.loss_sum, self.steps = sum(losses), len(losses)
        if trainer.step == 0:
            self._measure(trainer)

    def on_step_end(self, trainer: Trainer, batch: Batch, metrics: Metrics) -> None:
        self.loss_sum, self.steps = self.loss_sum + metrics["loss"], self.steps + 1
        every = trainer.options.logging.monitor_every
        if is_due(trainer, every) or trainer.step in (every // 8, every // 4, every // 2):
            self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        encoders = list(trainer.objective.encoders().items())
        if not encoders:
            return
        trainer.watchdog.note(f"computing feature statistics after step {trainer.step}")
        name, encoder = encoders[0]
        statistics = self.monitor.measure(encoder, trainer.watchdog.note)
        if not statistics:
            return
        loss = None
        if self.steps:
            mean = torch.as_tensor(self.loss_sum, dtype=torch.float32, device=trainer.world.device) / self.steps
            loss = float(trainer.world.mean(mean))
        self.loss_sum, self.steps = 0.0, 0
        found: dict[str, str] = {}
        if trainer.world.is_main:
            collapses = self.detector.update(Measurement(trainer.step, statistics, loss))
            found = {kind: f"{name}: {message}" for kind, message in collapses.items()}
            trainer.log.amend({"step": trainer.step, **statistics, **({"events": found} if found else {})})
            for message in found.values():
                logger.warning(message)
        if trainer.options.logging.stop_on_collapse:
            found = trainer.world.broadcast_from_rank0(lambda: found)
            if found:
                raise RunStopped(
                    "\n".join(found.values()) + "\nThe run stops, as logging.stop_on_collapse is set; the same command "
                    "goes on, as each kind of collapse is reported once"
                )


class Evaluation(Callback):
    """Logs one number of the model every `logging.monitor_every` steps.

    Args:
        name: Key in the log.
        measure: Computes the number; all processes call it. None: there is none, and nothing is logged.
        at_last_step: Whether it is computed after the last step, too.
    """

    def __init__(self, name: str, measure: Callable[[], float | None], at_last_step: bool = True):
        self.name, self.measure, self.at_last_step = name, measure, at_last_step

    def on_step_end(self, trainer: Trainer, batch: Batch, metrics: Metrics) -> None:
        last = trainer.step == trainer.last_step
        if trainer.step % trainer.options.logging.monitor_every == 0 or (last and self.at_last_step):
            trainer.watchdog.note(f"computing {self.name} after step {trainer.step}")
            if (number := self.measure()) is not None:
                trainer.log.amend({self.name: number})


class BadFileCheck(Callback):
    """Records unreadable videos, and stops the run when there are too many; see `BadFiles`."""

    def __init__(self, bad_files: BadFiles):
        self.bad_files = bad_files

    def on_step_end(self, trainer: Trainer, batch: Batch, metrics: Metrics) -> None:
        self.bad_files.record(batch)
        if is_due(trainer, trainer.options.logging.log_every):
            self.bad_files.sync()

    def on_stop(self, trainer: Trainer, error: Exception) -> None:
        if isinstance(error, NoReplacement):
            self.bad_files.add(error.files)


class MetricLogging(Callback):
    """Writes the run folder's log and moves the progress bar; stops a run whose updates are not finite."""

    def __init__(self, trainer: Trainer):
        options = trainer.options
        world = trainer.world
        self.run: RunFolder | None = None
        if world.is_main:
            self.run = RunFolder(trainer.folder, options, step=trainer.step)
            names, config = options.logging.loggers, options.model_dump(mode="json")
            self.run.loggers += make_loggers(names, trainer.folder, config, trainer.step)
        self.skipped: deque[bool] = deque(maxlen=100)
        self.skipped_since: int | None = None  # the first of the last updates in a row that were skipped
        self.last_loss = 0.0
        self.clips_per_step = 0
        self.bar = progress(
            desc=trainer.folder.name,
            total=trainer.last_step,
            initial=trainer.step,
            unit="step",
            off=not world.is_main,
        )

    def on_fit_start(self, trainer: Trainer) -> None:
        self._note_skipped([line for line in read_log(trainer.folder) if "loss" in line])
        if trainer.step == trainer.last_step:
            self._check_end(trainer)

    def on_step_end(self, trainer: Trainer, batch: Batch, metrics: Metrics) -> None:
        self.clips_per_step = batch.num_clips * trainer.world.world_size
        self.bar.update()
        if is_due(trainer, trainer.options.logging.log_every):
            self.flush(trainer)
        if sum(self.skipped) >= trainer.options.logging.max_nonfinite:
            raise RunStopped(self._skipped_message(trainer))
        if trainer.step == trainer.last_step:
            self._check_end(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        self.bar.close()
        if self.run is not None:
            self.run.close()

    def flush(self, trainer: Trainer) -> None:
        """Read the metrics of the steps since the last call from the device and write them."""
        lines = trainer.log.flush(self.clips_per_step)
        updates = [line for line in lines if "loss" in line]
        self.skipped.extend(self._note_skipped(updates))
        if self.run is None or not updates:
            return
        self.run.log(lines)
        last = updates[-1]
        shown = {"loss": f"{last['loss']:.4f}", "clips/s": f"{last['clips_per_second']:.0f}"}
        if "slowest_rank" in last:
            rank = int(last["slowest_rank"])
            shown["data"] = f"{last['data_seconds_mean']:.2f} s"
            shown["slowest"] = f"{last['data_seconds_slowest']:.2f} s, rank {rank} on {trainer.log.hosts[rank]}"
        self.bar.set_postfix(shown)

    def _note_skipped(self, updates: list[dict[str, Any]]) -> list[bool]:
        """Return which of the updates were skipped, from their lines of the log, where None stands for NaN."""
        skipped = []
        for line in updates:
            loss, norm = (math.nan if line[name] is None else line[name] for name in ("loss", "grad_norm"))
            skipped.append(not math.isfinite(loss + norm))
            self.last_loss = loss
            self.skipped_since = (self.skipped_since or line["step"]) if skipped[-1] else None
        return skipped

    def _check_end(self, trainer: Trainer) -> None:
        """Raise RunStopped where the run ends without having learned; warn where its last updates were skipped."""
        if self.skipped_since is None:
            return
        row = trainer.last_step - self.skipped_since + 1
        if not math.isfinite(self.last_loss) or 2 * row >= trainer.last_step:
            raise RunStopped(self._skipped_message(trainer))
        if trainer.world.is_main:
            logger.warning(self._skipped_message(trainer))

    def _skipped_message(self, trainer: Trainer) -> str:
        which = f"all updates since step {self.skipped_since} were skipped"
        if self.skipped_since is None:
            which = f"{sum(self.skipped)} of the last {len(self.skipped)} updates were skipped"
        return (
            f"{which} because the loss or its gradients were not finite. Lower optimization.lr, set "
            "optimization.clip_grad, or use meta.dtype=bfloat16 or float32, in another folder=…. The weights of the "
            f"last finite update are in {trainer.checkpoints}"
        )


class Checkpointing(Callback):
    """Saves every so many steps or minutes, after the last step, and before a stop signal ends the program."""

    def __init__(self, trainer: Trainer, logging: MetricLogging):
        self.logging = logging
        self.saved_step, self.saved_at = trainer.step, time.monotonic()

    def on_step_end(self, trainer: Trainer, batch: Batch, metrics: Metrics) -> None:
        options = trainer.options.logging
        minutes = (time.monotonic() - self.saved_at) / 60
        stop_signal = self._agree(trainer, int(trainer.signals.signal or minutes >= options.checkpoint_every_minutes))
        due = trainer.step in options.milestones or is_due(trainer, options.checkpoint_every_steps or trainer.last_step)
        if stop_signal or due:
            self.save(trainer)
        if stop_signal > 1:
            trainer.writer.finish()
            if trainer.world.is_main:
                logger.warning(
                    "%s: stopped after step %d of %d, saved in %s. The same command continues.",
                    signal.Signals(stop_signal).name, trainer.step, trainer.last_step, trainer.checkpoints,
                )  # fmt: skip
            sys.exit(128 + stop_signal)

    def on_fit_end(self, trainer: Trainer) -> None:
        trainer.writer.close()

    def save(self, trainer: Trainer) -> None:
        """Write the log, and start to write a checkpoint of the current state."""
        self.logging.flush(trainer)
        if self.saved_step != trainer.step:
            trainer.watchdog.note(f"saving step {trainer.step}")
            trainer.writer.start(trainer.step, trainer.state)
        self.saved_step, self.saved_at = trainer.step, time.monotonic()

    def _agree(self, trainer: Trainer, request: int) -> int:
        """Return the largest request of all processes: 0 nothing, 1 save, else the number of a stop signal.

        Processes ask each other only at steps at which they wait for the device anyway.
        """
        if trainer.world.world_size == 1:
            return request
        return trainer.world.max(request) if is_due(trainer, trainer.options.logging.log_every) else 0
