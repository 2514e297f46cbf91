"""Where metrics go besides `log.jsonl`: TensorBoard, Weights & Biases, MLflow."""

import importlib
import logging
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tubelet.config import ConfigError, nearest
from tubelet.runtime.files import read_json, write_json
from tubelet.runtime.run_folder import MetricLogger

logger = logging.getLogger(__name__)

KEY = "logging.loggers"
RUN_IDS = "loggers.json"
"""File in the run folder: name of a logger -> id of the run in that service. A resumed run continues it."""
PROJECT = "tubelet"
MAX_PARAM = 500  # characters of an MLflow parameter

__all__ = ["LOGGERS", "MetricLogger", "check_loggers", "make_loggers"]


class TensorBoardLogger:
    """Event files in `<folder>/tensorboard`.

    Args:
        folder: Run folder.
        config: Resolved configuration; not used.
        step: Last step that is kept when a run is resumed; later events of an earlier start are discarded.
    """

    package = "tensorboard"

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbLogger:
    """A run of Weights & Biases, with its local files in `<folder>/wandb`.

    wandb's environment variables apply: `WANDB_PROJECT` (default: tubelet), `WANDB_ENTITY`, and `WANDB_MODE=offline`
    for machines without a network; `wandb sync` uploads such runs later. Curves are drawn over `step`, so that steps
    that are repeated after a restart overwrite nothing and are not dropped.
    """

    package = "wandb"

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int):
        wandb = _import("wandb")
        run_id = _stored_id(folder, "wandb") or _store_id(folder, "wandb", uuid.uuid4().hex[:8])
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                config=dict(config),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"{KEY}: wandb cannot start: {error}\nRun `wandb login`, or set WANDB_MODE=offline and upload the run "
                f"later with `wandb sync {folder}/wandb/offline-run-*`"
            ) from error
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log({**metrics, "step": step})

    def close(self) -> None:
        self.run.finish()


class MLflowLogger:
    """A run of MLflow, with the configuration as parameters.

    MLflow's environment variables apply: `MLFLOW_TRACKING_URI` (default: the database `<folder>/mlflow.db`, which needs
    no server) and `MLFLOW_EXPERIMENT_NAME` (default: tubelet). Metrics are sent in the background.
    """

    package = "mlflow"

    def __init__(self, folder: Path, config: Mapping[str, Any], step: int):
        mlflow = _import("mlflow")
        self.entities = importlib.import_module("mlflow.entities")
        self.error: type[Exception] = mlflow.MlflowException
        uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder.absolute() / 'mlflow.db'}")
        try:
            self.client = mlflow.MlflowClient(tracking_uri=uri)
            self.run_id = self._continue_run(folder) or self._start_run(folder, config)
        except self.error as error:
            raise ConfigError(
                f"{KEY}: mlflow cannot start a run in {uri}: {error}\nCheck MLFLOW_TRACKING_URI; to start a new MLflow "
                f"run, remove {folder / RUN_IDS}"
            ) from error
        self.last_operation: Any = None

    def _continue_run(self, folder: Path) -> str | None:
        run_id = _stored_id(folder, "mlflow")
        if run_id is not None:
            self.client.update_run(run_id, status="RUNNING")
        return run_id

    def _start_run(self, folder: Path, config: Mapping[str, Any]) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        experiment_id = self.client.create_experiment(name) if experiment is None else experiment.experiment_id
        run_id = self.client.create_run(experiment_id, run_name=folder.name).info.run_id
        params = [self.entities.Param(key, str(value)[:MAX_PARAM]) for key, value in _flat(config)]
        for first in range(0, len(params), 100):  # the most that MLflow takes at once
            self.client.log_batch(run_id, params=params[first : first + 100])
        return _store_id(folder, "mlflow", run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        batch = [self.entities.Metric(name, value, now, step) for name, value in metrics.items()]
        self.last_operation = self.client.log_batch(self.run_id, metrics=batch, synchronous=False)

    def close(self) -> None:
        """Wait for the metrics that are still being sent. A server that does not answer ends no finished run."""
        try:
            if self.last_operation is not None:
                self.last_operation.wait()
            self.client.set_terminated(self.run_id)
        except self.error as error:
            logger.warning("MLflow did not receive the last metrics; log.jsonl has them all: %s", error)


LOGGERS: dict[str, type[TensorBoardLogger] | type[WandbLogger] | type[MLflowLogger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MLflowLogger,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raise ConfigError where a logger is unknown or its package is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise ConfigError(f"{KEY}: unknown logger '{name}'. {nearest(name, LOGGERS)}")
        _import(LOGGERS[name].package)


def make_loggers(names: Sequence[str], folder: Path, config: dict[str, Any], step: int) -> list[MetricLogger]:
    """Start the loggers of a run, or continue them when it is resumed. Only rank 0 calls it.

    Args:
        names: Keys of `LOGGERS`.
        folder: Run folder.
        config: Resolved configuration, as JSON types.
        step: Step from which the run continues; 0 for a new run.

    Raises:
        ConfigError: A logger is unknown, is not installed, or cannot start.
    """
    check_loggers(names)
    folder.mkdir(parents=True, exist_ok=True)
    return [LOGGERS[name](folder, config, step) for name in names]


def _import(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ConfigError(
            f"{KEY}: {package} is not installed. Run `pip install {package}`, or remove it from {KEY}"
        ) from None


def _stored_id(folder: Path, name: str) -> str | None:
    return (read_json(folder / RUN_IDS) or {}).get(name)


def _store_id(folder: Path, name: str, run_id: str) -> str:
    write_json(folder / RUN_IDS, {**(read_json(folder / RUN_IDS) or {}), name: run_id})
    return run_id


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values; lists are values."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
