import json
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tubelet.config import Config, ConfigError
from tubelet.runtime.run_folder import RunFolder, read_log
from tubelet.training.loggers import RUN_IDS, check_loggers, make_loggers

CONFIG = {"folder": "runs/x", "optimization": {"lr": 0.1, "betas": [0.9, 0.95]}, "mask": []}


@pytest.fixture
def wandb(monkeypatch):
    """A fake wandb whose runs collect what is logged; `service` holds them by id."""
    module = types.ModuleType("wandb")
    module.Error = type("Error", (Exception,), {})
    module.service, module.calls = {}, []

    class Run:
        def __init__(self, id):
            self.lines, self.axes, self.finished = module.service.setdefault(id, []), {}, False

        def define_metric(self, name, step_metric=None):
            self.axes[name] = step_metric

        def log(self, data):
            self.lines.append(data)

        def finish(self):
            self.finished = True

    def init(**options):
        module.calls.append(options)
        assert options["resume"] == "allow"
        return Run(options["id"])

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    """A fake mlflow; `service` holds its runs by id."""
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    module.MlflowException = type("MlflowException", (Exception,), {})
    module.service, module.uris, module.server_is_down = {}, [], False
    entities.Metric = lambda key, value, timestamp, step: (step, key, value)
    entities.Param = lambda key, value: (key, value)

    class Operation:
        def wait(self):
            if module.server_is_down:
                raise module.MlflowException("no answer")

    class Client:
        def __init__(self, tracking_uri):
            module.uris.append(tracking_uri)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return f"experiment {name}"

        def create_run(self, experiment_id, run_name):
            run_id = f"run{len(module.service)}"
            module.service[run_id] = {"experiment": experiment_id, "status": "RUNNING", "metrics": [], "params": {}}
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run_id))

        def update_run(self, run_id, status):
            if run_id not in module.service:
                raise module.MlflowException(f"Run {run_id} not found")
            module.service[run_id]["status"] = status

        def log_batch(self, run_id, metrics=(), params=(), synchronous=True):
            assert len(params) <= 100
            module.service[run_id]["metrics"] += metrics
            module.service[run_id]["params"].update(params)
            return None if synchronous else Operation()

        def set_terminated(self, run_id):
            module.service[run_id]["status"] = "FINISHED"

    module.MlflowClient = Client
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return module


def run(name, folder, lines, step=0):
    (logger,) = make_loggers([name], folder, CONFIG, step)
    for at, metrics in lines:
        logger.log(at, metrics)
    logger.close()


def test_tensorboard_discards_the_steps_after_the_checkpoint(tmp_path):
    run("tensorboard", tmp_path, [(step, {"loss": 1.0 / step}) for step in (1, 2, 3, 4)])
    run("tensorboard", tmp_path, [(3, {"loss": 0.25})], step=2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_wandb_continues_its_run(wandb, tmp_path):
    run("wandb", tmp_path, [(1, {"loss": 1.0}), (2, {"loss": 0.5})])
    run("wandb", tmp_path, [(2, {"loss": 0.5})], step=1)
    (lines,) = wandb.service.values()
    assert lines == [{"loss": 1.0, "step": 1}, {"loss": 0.5, "step": 2}, {"loss": 0.5, "step": 2}]
    assert {call["dir"] for call in wandb.calls} == {str(tmp_path)}
    assert wandb.calls[0]["config"] == CONFIG
    assert json.loads((tmp_path / RUN_IDS).read_text()) == {"wandb": wandb.calls[0]["id"]}


def test_runs_in_other_folders_are_other_runs(wandb, mlflow, tmp_path):
    for name in ("wandb", "mlflow"):
        run(name, tmp_path / "a", [])
        run(name, tmp_path / "b", [])
    assert len(wandb.service) == len(mlflow.service) == 2


def test_wandb_without_credentials_is_a_configuration_error(wandb, tmp_path):
    def init(**options):
        raise wandb.Error("No API key configured")

    wandb.init = init
    with pytest.raises(ConfigError, match=r"(?s)logging\.loggers.*No API key.*WANDB_MODE=offline"):
        make_loggers(["wandb"], tmp_path, CONFIG, 0)


def test_mlflow_continues_its_run_in_a_local_database(mlflow, tmp_path):
    run("mlflow", tmp_path, [(1, {"loss": 1.0})])
    assert mlflow.service["run0"]["status"] == "FINISHED"
    (logger,) = make_loggers(["mlflow"], tmp_path, CONFIG, 1)
    assert mlflow.service["run0"]["status"] == "RUNNING"
    logger.log(2, {"loss": 0.5, "lr": 0.1})
    logger.close()
    assert list(mlflow.service) == ["run0"]
    assert mlflow.service["run0"]["metrics"] == [(1, "loss", 1.0), (2, "loss", 0.5), (2, "lr", 0.1)]
    assert mlflow.service["run0"]["params"] == {
        "folder": "runs/x", "optimization.lr": "0.1", "optimization.betas": "[0.9, 0.95]", "mask": "[]"
    }  # fmt: skip
    assert set(mlflow.uris) == {f"sqlite:///{tmp_path}/mlflow.db"}


def test_mlflow_run_that_is_gone_is_a_configuration_error(mlflow, tmp_path):
    run("mlflow", tmp_path, [])
    mlflow.service.clear()
    with pytest.raises(ConfigError, match=rf"(?s)run0 not found.*remove .*{RUN_IDS}"):
        make_loggers(["mlflow"], tmp_path, CONFIG, 0)


def test_mlflow_server_that_does_not_answer_ends_no_run(mlflow, tmp_path, caplog):
    (logger,) = make_loggers(["mlflow"], tmp_path, CONFIG, 0)
    logger.log(1, {"loss": 1.0})
    mlflow.server_is_down = True
    logger.close()
    assert "MLflow did not receive the last metrics" in caplog.text


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_package_is_named_with_its_remedy(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # imports raise ModuleNotFoundError
    with pytest.raises(ConfigError, match=rf"logging\.loggers: {name} is not installed. Run `pip install {name}`"):
        make_loggers(["tensorboard", name], tmp_path / "run", CONFIG, 0)
    assert not (tmp_path / "run").exists()  # nothing has been started


def test_unknown_logger_is_an_error():
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        check_loggers(["wanbd"])


def test_run_folder_gives_finite_metrics_to_its_loggers(tmp_path):
    class Recorder:
        lines, closed = [], False

        def log(self, step, metrics):
            self.lines.append((step, metrics))

        def close(self):
            self.closed = True

    recorder = Recorder()
    folder = RunFolder(tmp_path, Config(), step=0, loggers=[recorder])
    folder.log([{"step": 1, "last_step": 9, "loss": 2.0, "grad_norm": float("inf")}])
    folder.close()
    assert recorder.lines == [(1, {"loss": 2.0})]
    assert recorder.closed


def test_logger_that_fails_is_removed_and_the_run_continues(tmp_path, caplog):
    class Failing:
        calls = 0

        def log(self, step, metrics):
            self.calls += 1
            raise OSError("network is unreachable")

        def close(self):
            raise AssertionError("a removed logger is not closed")

    class FailsToClose:
        steps = []

        def log(self, step, metrics):
            self.steps.append(step)

        def close(self):
            raise OSError("no space left on device")

    failing, other = Failing(), FailsToClose()
    folder = RunFolder(tmp_path, Config(), step=0, loggers=[failing, other])
    folder.log([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    folder.close()
    assert failing.calls == 1
    assert other.steps == [1, 2]
    assert [line["loss"] for line in read_log(tmp_path)] == [2.0, 1.0]
    for text in ("Failing failed", "network is unreachable", "FailsToClose could not be closed"):
        assert text in caplog.text
