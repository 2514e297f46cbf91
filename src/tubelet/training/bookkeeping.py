"""What a training loop does beside training: log, progress, features, checkpoints, stopping."""

import math
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field
from torch import Tensor, nn

from tubelet.config import Config, UserError
from tubelet.data import Batch
from tubelet.data.bad_files import BadFiles, TooManyBadFiles
from tubelet.runtime.checkpoint_writer import Saver
from tubelet.runtime.distributed import World
from tubelet.runtime.progress import progress
from tubelet.runtime.run_folder import RunFolder, read_log
from tubelet.runtime.watchdog import Watchdog
from tubelet.training.monitor import FeatureMonitor, warn_of_collapse
from tubelet.training.step_log import StepLog


class LoggingConfig(Config):
    """YAML section `logging`."""

    log_every: int = Field(10, ge=1)
    """Steps between two readings of the device; the log still gets one line a step."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    checkpoint_every_minutes: float = Field(10, gt=0)
    keep_checkpoints: int = Field(3, ge=1)
    monitor_every: int = Field(500, ge=1)
    """Steps between two looks at rank, spread and nearest neighbours of the target encoder's features."""
    monitor_clips: int = Field(256, ge=0)
    """Clips looked at; 0 for none."""
    max_nonfinite: int = Field(20, ge=1)
    """The run stops when this many of the last 100 updates were skipped because loss or gradients were not finite."""


class Stateful(Protocol):
    """What is trained: it counts its updates, and its `state` is what a checkpoint holds."""

    step: int

    def state(self) -> dict[str, Any]: ...


class TrainingStopped(UserError):
    """The run cannot usefully go on. The message says why and what to do; a good checkpoint has been written."""


class Bookkeeping:
    """Keeps the run's folder, progress bar and checkpoints; leaving its `with` block closes them.

    Every process has one; only the main one writes, but for checkpoints of a sharded model. `free`: keys of the
    configuration that may differ when a run is continued, see `RunFolder`. `timeout`: of the `Watchdog`.
    """

    def __init__(
        self,
        options: Config,
        logging: LoggingConfig,
        folder: Path,
        training: Stateful,
        *,
        last_step: int,
        free: tuple[str, ...],
        bad_files: BadFiles,
        monitor: FeatureMonitor | None,
        world: World,
        sharded: bool,
        timeout: float,
    ):
        self.logging, self.folder, self.training, self.last_step = logging, folder, training, last_step
        self.bad_files, self.monitor, self.world = bad_files, monitor, world
        self.run = RunFolder(folder, options, step=training.step, free=free) if world.is_main else None
        self.log = StepLog(world)
        self.watchdog = Watchdog(world, timeout)
        self.saver = Saver(folder / "checkpoints", logging.keep_checkpoints, world, sharded)
        self.skipped: deque[bool] = deque(maxlen=100)
        self.started_at = self.saved_step = training.step
        self.saved_at = time.monotonic()
        self.first_look = next((line for line in read_log(folder) if "spread_across" in line), None)
        self.clips_per_step = 0
        self.shown: dict[str, str] = {}
        self.bar = progress(
            desc=folder.name, total=last_step, initial=training.step, unit="step", off=not world.is_main
        )

    def with_waiting_time(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, float]]:
        """Each batch with the seconds that the loop waited for it."""
        iterator = iter(batches)
        while True:
            self.watchdog.note(f"waiting for the data of step {self.training.step + 1}")
            asked = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.watchdog.note(f"in step {self.training.step + 1}")
            yield batch, time.perf_counter() - asked

    def note_step(self, batch: Batch, numbers: dict[str, float], tensors: dict[str, Tensor]) -> None:
        """Note an update for the log, and the videos that could not be read."""
        self.log.add({"step": self.training.step, "last_step": self.last_step, **numbers}, tensors)
        self.bar.update()
        self.bad_files.record(batch)
        self.clips_per_step = len(batch.clips) * self.world.world_size

    def look_at_features(self, encoder: nn.Module) -> None:
        """Every `monitor_every` updates, the first and the last: measure the features; warn when they collapse."""
        seen = 0 < self.training.step == self.started_at
        if self.monitor is None or seen or not self._due(self.logging.monitor_every):
            return
        self.watchdog.note(f"looking at features after step {self.training.step}")
        look = self.monitor.look(encoder)
        if self.run is None:  # its part of the work on a sharded encoder is done
            return
        self.log.amend({"step": self.training.step, **look})
        self.first_look = self.first_look or look
        self.shown |= {"rank": f"{look['rank_uncentered']:.1f}", "spread": f"{look['spread_across']:.2f}"}
        warn_of_collapse(look, self.first_look)

    def write_log_if_due(self) -> None:
        """Every `log_every` updates: read the device and write the lines.

        Raises TrainingStopped on a diverged run and TooManyBadFiles where too many videos cannot be read, in all
        processes at the same step.
        """
        if self._due(self.logging.log_every):
            self._write_log()
            draws, bad_draws = zip(
                *self.world.all_gather_object((self.bad_files.draws, self.bad_files.bad_draws)), strict=True
            )
            self.bad_files.judge(sum(draws), sum(bad_draws))
        if sum(self.skipped) >= self.logging.max_nonfinite:
            raise TrainingStopped(
                f"{sum(self.skipped)} of the last {len(self.skipped)} updates were skipped because the loss or its "
                "gradients were not finite. Lower optimization.lr, set optimization.clip_grad, or use "
                "meta.dtype=bfloat16 or float32. The weights of the last finite update are in "
                f"{self.folder / 'checkpoints'}"
            )

    def save_if_due(self, interrupted_by: signal.Signals | None) -> None:
        """Save every so many updates or minutes, at the last update, and after a signal, which ends the program."""
        minutes = (time.monotonic() - self.saved_at) / 60
        overdue = minutes >= self.logging.checkpoint_every_minutes
        # Numbers of signals are above 1, so the largest wish of all processes says what to do.
        wish = self._agreed(int(interrupted_by or overdue))
        if wish or self._due(self.logging.checkpoint_every_steps or self.last_step):
            self.save()
        if wish > 1:
            self.saver.finish()
            self.bar.write(
                f"{signal.Signals(wish).name}: stopped after step {self.training.step} of {self.last_step}, saved in "
                f"{self.folder / 'checkpoints'}. The same command continues."
            )
            sys.exit(128 + wish)

    def save(self) -> None:
        """Write the log so far, and begin to write a checkpoint of the state as it is."""
        self._write_log()
        if self.saved_step != self.training.step:
            self.watchdog.note(f"saving step {self.training.step}")
            self.saver.start(self.training.step, self.training.state)
        self.saved_step, self.saved_at = self.training.step, time.monotonic()

    def __enter__(self) -> "Bookkeeping":
        self.watchdog.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        stopped = isinstance(error, TrainingStopped | TooManyBadFiles)  # which all processes raise at the same step
        if stopped:
            self.save()
        self.bar.close()
        if self.run is not None:
            self.run.close()
        self.saver.close()  # waits for what is being written
        self.watchdog.__exit__(kind, None if stopped else error, trace)
        if error is None or stopped:
            self.saver.finish()

    def _write_log(self) -> None:
        lines = self.log.flush(self.clips_per_step)
        updates = [line for line in lines if "loss" in line]
        self.skipped.extend(not math.isfinite(line["loss"] + line["grad_norm"]) for line in updates)
        if self.run is not None and updates:
            self.run.log(lines)
            last = updates[-1]
            self.shown |= {"loss": f"{last['loss']:.4f}", "clips/s": f"{last['clips_per_second']:.0f}"}
            if "slowest_rank" in last:
                slowest = f"{last['data_seconds_slowest']:.2f} s, rank {last['slowest_rank']}"
                host = self.log.hosts[last["slowest_rank"]]
                self.shown |= {"waits": f"{last['data_seconds_mean']:.2f} s", "slowest": f"{slowest} on {host}"}
            self.bar.set_postfix(self.shown)

    def _due(self, every: int) -> bool:
        return self.training.step % every == 0 or self.training.step == self.last_step

    def _agreed(self, wish: int) -> int:
        """The largest wish of all processes, which ask each other only when they wait for the device anyway."""
        if self.world.world_size == 1:
            return wish
        return self.world.max(wish) if self._due(self.logging.log_every) else 0
