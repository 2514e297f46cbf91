"""The training loop of every program."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tubelet
from tubelet.config import ConfigError, UserError
from tubelet.data import Batch
from tubelet.data.bad_files import NoReplacement, TooManyBadFiles
from tubelet.runtime import checkpoint, parallelize, precision
from tubelet.runtime.attention_kernels import attention_kernels
from tubelet.runtime.checkpoint import CheckpointError, CheckpointState
from tubelet.runtime.checkpoint_writer import Saver
from tubelet.runtime.devices import make_deterministic
from tubelet.runtime.distributed import World
from tubelet.runtime.run_folder import check_same_configuration
from tubelet.runtime.seeds import seed_for
from tubelet.runtime.signals import SignalHandler
from tubelet.runtime.watchdog import Watchdog
from tubelet.training.callbacks import Callback, Checkpointing, MetricLogging, RunStopped
from tubelet.training.loggers import check_loggers
from tubelet.training.objective import Objective, StepRng
from tubelet.training.optimizer import adamw, clip_gradients, set_hyperparameters
from tubelet.training.options import TrainingOptions
from tubelet.training.schedules import Schedule
from tubelet.training.step_log import StepLog

logger = logging.getLogger(__name__)

# Keys of the log that the trainer sets itself.
_RESERVED = ("step", "lr", "weight_decay", "samples", "grad_norm")


class Stateful(Protocol):
    """Part of a run besides the objective whose state, as JSON types, goes into checkpoints."""

    def metadata(self) -> dict[str, Any]: ...

    def load_metadata(self, metadata: dict[str, Any]) -> None: ...


class Trainer:
    """Trains any objective: accumulation, precision, clipping, DDP or FSDP2, resuming, logging, checkpoints, signals.

    Args:
        objective: What is learned.
        options: Options of the program; `config.yaml` in the run folder holds them.
        schedule: Learning rate, weight decay and clipping of each step.
        world: The processes of the run.
        global_batch: Samples of a step in all processes together.
        batch_size_key: Key of the option for the batch size of a process, for messages.
        config: Configuration that checkpoints hold for `hub`; by default all of `options`.
        data_state: State of the data source, if it has any.
    """

    def __init__(
        self,
        objective: Objective,
        options: TrainingOptions,
        schedule: Schedule,
        world: World,
        *,
        global_batch: int,
        batch_size_key: str = "data.batch_size",
        config: dict[str, Any] | None = None,
        data_state: Stateful | None = None,
    ):
        self.options, self.schedule, self.world = options, schedule, world
        self.global_batch, self.batch_size_key, self.data_state = global_batch, batch_size_key, data_state
        self.config = options.model_dump(mode="json") if config is None else config
        self.folder, self.seed, self.step = Path(options.folder), options.meta.seed, 0
        check_loggers(options.logging.loggers)
        if options.meta.deterministic:
            make_deterministic()
        world.broadcast_from_rank0(lambda: check_same_configuration(self.folder, options))
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if options.meta.tf32 else "highest")
        self.objective = objective.to(world.device)
        parts = objective.parts()
        _check_parts(objective, parts)
        if options.meta.compile:
            for part in parts.values():
                parallelize.compile_blocks(part)
        self.dtype = options.dtype_on(world.device)
        precision.warn_if_emulated(self.dtype, world.device, "meta.dtype=auto in a new folder")
        self.model = parallelize.parallelize(objective, list(parts.values()), options.distributed, world, self.dtype)
        self.sharded = parallelize.is_sharded(self.model)
        o = options.optimization
        self.trained = objective.trained_parts()
        self.optimizer = adamw(
            self.trained.values(),
            lr=schedule.lr(0),
            weight_decay=schedule.weight_decay(0),
            betas=o.betas,
            eps=o.eps,
            lr_scales=objective.lr_scales(),
        )
        self.scales_loss = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, init_scale=2.0**16, enabled=self.scales_loss)
        self.watchdog = Watchdog(world, options.distributed.timeout)
        self.signals = SignalHandler()
        keep, milestones = options.logging.keep_checkpoints, options.logging.milestones
        self.writer = Saver(self.checkpoints, keep, world, self.sharded, milestones)
        self.log = StepLog(world)
        self.data_seconds = 0.0
        self.first_step = 0  # of this start of the run

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.folder / "checkpoints"

    @property
    def last_step(self) -> int:
        return self.schedule.last_step

    def fit(self, batches: Iterable[Batch], callbacks: Sequence[Callback] = ()) -> None:
        """Train on `batches`, those of the steps from `self.step` to the last.

        Raises:
            RunStopped: The run cannot go on usefully; a checkpoint has been written.
            SystemExit: A stop signal arrived; a checkpoint has been written.
        """
        metric_logging = MetricLogging(self)
        saving = Checkpointing(self, metric_logging)
        callbacks = [*callbacks, metric_logging, saving]
        stopped = None
        with self.signals, self.watchdog:
            try:
                for callback in callbacks:
                    callback.on_fit_start(self)
                for batch in self._timed(batches):
                    metrics = self.train_step(batch)
                    self._log_step(metrics)
                    for callback in callbacks:
                        callback.on_step_end(self, batch, metrics)
            except (RunStopped, TooManyBadFiles) as error:
                stopped = error
                for callback in callbacks:
                    callback.on_stop(self, error)
                # Raised by all processes at the same step, with one exception.
                if not isinstance(error, NoReplacement) or self.world.world_size == 1:
                    saving.save(self)
            finally:
                for callback in callbacks:
                    callback.on_fit_end(self)
            self.writer.finish()
        if stopped is not None:
            raise stopped

    def train_step(self, batch: Batch) -> dict[str, float | Tensor]:
        """Take one optimizer step: losses, gradients, update, EMA. Returns the metrics of the step."""
        lr, weight_decay = self.schedule.lr(self.step), self.schedule.weight_decay(self.step)
        set_hyperparameters(self.optimizer, lr=lr, weight_decay=weight_decay)
        samples = batch.num_global or len(batch) * self.world.world_size
        losses = self.forward_backward(batch, samples)
        grad_norm = self.update(self.schedule.clip_grad(self.step))
        metrics = self.objective.on_update(self.step)
        self.step += 1
        rates = {"lr": lr, "weight_decay": weight_decay, "samples": samples}
        return {**rates, **metrics, **losses, "grad_norm": grad_norm}

    def forward_backward(self, batch: Batch, samples: int) -> dict[str, Tensor]:
        """Accumulate the gradients of the mean loss over the samples of all processes.

        Args:
            batch: This process's part of the global batch.
            samples: Number of samples in the global batch.

        Returns:
            The losses of this process's samples, on the device, scaled such that their mean over the processes is the
            mean over all samples.
        """
        torch.manual_seed(seed_for(self.seed, self.step, self.world.rank, "dropout"))
        batch = batch.to(self.world.device)
        rng = StepRng(self.seed, self.step, first_sample=self.world.rank * len(batch))
        batch = self.objective.prepare_batch(batch, rng)
        losses: dict[str, Tensor] = {}
        parts = batch.split(self.options.optimization.accumulation_steps)
        for i, part in enumerate(parts):
            weight = len(part) * self.world.world_size / samples
            kernels = attention_kernels(self.options.meta.attention, self.world.device)
            with kernels, parallelize.gradient_sync(self.model, now=i == len(parts) - 1):
                with self.autocast():
                    terms = self.model(part, rng)
                _check_terms(self.objective, terms)
                self.scaler.scale(terms["loss"] * weight).backward()
            for name, term in terms.items():
                losses[name] = losses.get(name, 0.0) + term.detach() * weight
            rng = rng.skip(len(part))
        if self.step == self.first_step and isinstance(self.model, DistributedDataParallel):
            self._check_all_have_gradients()
        return losses

    def _check_all_have_gradients(self) -> None:
        """Raise UserError where DDP would wait for the gradients of parameters that the loss does not use."""
        parameters = self.objective.named_parameters()
        if unused := [name for name, p in parameters if p.requires_grad and p.grad is None]:
            more = f" and {len(unused) - 10} more" if len(unused) > 10 else ""
            raise UserError(
                f"the loss of {type(self.objective).__qualname__} does not use {', '.join(unused[:10])}{more}. With "
                "several processes every trained parameter has to be used in each step; remove these, or set their "
                "requires_grad to False"
            )

    def update(self, clip_grad: float) -> Tensor:
        """Clip the gradients and take a step, unless a gradient is not finite. Returns the gradient norm."""
        if self.scales_loss:
            self.scaler.unscale_(self.optimizer)
        groups = [list(part.parameters()) for part in self.trained.values()]
        grad_norm = clip_gradients(groups, clip_grad, separately=self.options.optimization.clip_separately)
        if self.scales_loss:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:  # as the scaler does: the fused kernel skips the update, without reading from the device
            self.optimizer.found_inf = (~grad_norm.isfinite()).float()  # type: ignore[attr-defined]
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def autocast(self) -> torch.autocast:
        """Return the context of forward passes."""
        return precision.autocast(self.world.device, self.dtype)

    def state(self) -> CheckpointState:
        """Return everything that the run needs to go on."""
        return CheckpointState(
            weights={name: parallelize.model_state(part) for name, part in self.objective.parts().items()},
            optimizer=parallelize.optimizer_state(self.objective, self.optimizer),
            metadata={
                "version": tubelet.__version__,
                "step": self.step,
                "global_batch": self.global_batch,
                "dtype": precision.name(self.dtype),
                "scaler": self.scaler.state_dict(),
                "config": self.config,
                "encoders": list(self.objective.encoders()),
                **self.objective.metadata(),
                **({} if self.data_state is None else self.data_state.metadata()),
            },
        )

    def resume(self) -> bool:
        """Continue from the newest checkpoint of the run folder; return whether there is one.

        Raises:
            ConfigError: `meta.load_checkpoint` is false, but the folder holds a run.
            CheckpointError: The checkpoint does not match the model, the data, the global batch or the precision.
        """
        path = self.world.broadcast_from_rank0(lambda: checkpoint.newest(self.checkpoints))
        if path is None:
            return False
        if not self.options.meta.load_checkpoint:
            raise ConfigError(f"{self.folder} holds a run; with meta.load_checkpoint=false, choose another folder=…")
        state = checkpoint.read(path, like=self.state() if self.sharded else None)
        metadata = state.metadata
        checkpoint.check_complete(metadata, ("step", "scaler"), path)
        checkpoint.check_same_batch_size(metadata, self.global_batch, self.batch_size_key)
        self._check_same_dtype(metadata)
        self.objective.check_metadata(metadata)
        if self.data_state is not None:
            self.data_state.load_metadata(metadata)
        self.load_weights(state.weights, str(path))
        if state.optimizer is None:
            raise CheckpointError(f"{path}: it has no optimizer state, so the run cannot be continued")
        parallelize.load_optimizer_state(self.objective, self.optimizer, state.optimizer)
        self.scaler.load_state_dict(metadata["scaler"])
        self.step = self.first_step = metadata["step"]
        if "version" not in metadata and self.world.is_main:
            logger.warning(
                "%s was written by version 0.1, whose learning rate and weight decay were one step behind the "
                "published schedules; the run continues with the published ones",
                path,
            )
        return True

    def _check_same_dtype(self, metadata: Mapping[str, Any]) -> None:
        """Raise CheckpointError where the run was computed in another type; `auto` depends on the machine."""
        saved, here = metadata.get("dtype"), precision.name(self.dtype)
        if saved not in (None, here):  # None: version 0.1
            raise CheckpointError(
                f"{self.folder}: the run was begun in {saved}, meta.dtype={self.options.meta.dtype} is {here} here. "
                f"Set meta.dtype={saved}, or choose another folder=…"
            )

    def load_weights(self, weights: dict[str, dict[str, Tensor]], source: str) -> None:
        """Load the weights of all parts. Raises CheckpointError where a part is missing or does not fit."""
        parts = self.objective.parts()
        if missing := [name for name in parts if name not in weights]:
            raise CheckpointError(f"{source} has no {' and no '.join(missing)}; it holds {', '.join(weights)}")
        for name, part in parts.items():
            checkpoint.load_weights(part, weights[name], f"{name} of {source}")

    def _log_step(self, metrics: dict[str, float | Tensor]) -> None:
        numbers = {name: value for name, value in metrics.items() if not isinstance(value, Tensor)}
        tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        progress = {"step": self.step, "last_step": self.last_step, "data_seconds": self.data_seconds}
        self.log.add({**progress, **numbers}, tensors)

    def _timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches; note for the watchdog and the log how long the loop waited for each."""
        iterator = iter(batches)
        while True:
            self.watchdog.note(f"waiting for the data of step {self.step + 1}")
            start = time.perf_counter()
            batch = next(iterator, None)
            if batch is None:
                return
            self.data_seconds = time.perf_counter() - start
            self.watchdog.note(f"in step {self.step + 1}")
            yield batch


def _check_parts(objective: Objective, parts: dict[str, nn.Module]) -> None:
    """Raise UserError where parameters, buffers or encoders would not be trained, or not be stored in checkpoints."""
    stored = {id(parameter) for part in parts.values() for parameter in part.parameters()}
    missing = [name for name, p in objective.named_parameters() if p.requires_grad and id(p) not in stored]
    persistent = objective.state_dict()
    missing += [name for name, _ in objective.named_buffers(recurse=False) if name in persistent]
    if missing:
        raise UserError(
            f"{type(objective).__qualname__}.parts() lacks {', '.join(missing)}: it would not be trained, or not be "
            "stored in checkpoints. Put parameters and buffers into a module that is an attribute of the objective"
        )
    if foreign := [name for name, encoder in objective.encoders().items() if parts.get(name) is not encoder]:
        raise UserError(
            f"{type(objective).__qualname__}.encoders() has {', '.join(foreign)}, which its parts() do not have under "
            f"the same name; they are {', '.join(parts)}"
        )


def _check_terms(objective: Objective, terms: Any) -> None:
    """Raise UserError where the losses of an objective are not what `Objective.forward` promises."""
    forward = f"{type(objective).__qualname__}.forward"
    if not isinstance(terms, dict) or "loss" not in terms:
        found = f"a dict with {', '.join(map(str, terms))}" if isinstance(terms, dict) else type(terms).__name__
        raise UserError(f"{forward} returned {found}; it has to be a dict of scalar tensors with the key 'loss'")
    for name, term in terms.items():
        if name in _RESERVED:
            raise UserError(f"{forward} returned the key '{name}', which the log uses itself; choose another name")
        if not isinstance(term, Tensor) or term.ndim:
            found = f"a tensor of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise UserError(f"{forward} returned {found} for '{name}'; it has to be a scalar tensor")
    if not terms["loss"].requires_grad:
        raise UserError(f"the 'loss' that {forward} returned depends on no trained parameter (detached?)")
