"""Pretraining as a whole: the same run done another way gives the same numbers."""

import dataclasses
import html
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from app.vjepa.options import Options
from app.vjepa.train import initialize, main, make_trainer
from tests.processes import run_program
from tubelet import config, report
from tubelet.config import ConfigError
from tubelet.data import Batch
from tubelet.data.transforms import TrainTransform
from tubelet.runtime import checkpoint, precision
from tubelet.runtime.checkpoint import CheckpointError
from tubelet.runtime.distributed import World
from tubelet.training.callbacks import RunStopped
from tubelet.training.monitor import FeatureMonitor

ROOT = Path(__file__).parents[2]
STEPS = 14


def start(path, *overrides):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "app.main", "--fname", str(path), "--devices", "cpu", *overrides],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(path, *overrides):
    done = run_program("app.main", "--fname", path, "--devices", "cpu", *overrides)
    assert done.returncode == 0, done.stdout


def wait_for_step(folder, step, process):
    """Until the run's log has reached `step`."""
    log = folder / "log.jsonl"
    while not log.exists() or f'"step": {step},' not in log.read_text():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)


def final_state(folder):
    state = checkpoint.read(Path(folder) / "checkpoints" / "latest")
    assert state.metadata["step"] == STEPS
    return dataclasses.asdict(state)


def assert_same(a, b, path="state"):
    """Bit for bit, all the way down; the configuration aside."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"config"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}.{i}")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def straight_run(videos, tmp_path_factory):
    """The last state of a run that was never stopped; made once for each configuration."""
    done = {}

    def of(small):
        path = small()
        if "state" not in done:
            folder = tmp_path_factory.mktemp("straight")
            main(config.load(path, [f"folder={folder}"], Options), World())
            done["state"] = final_state(folder)
            done["losses"] = losses(folder)
        return done

    return of


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0)])
def test_kill_9_and_start_again_is_bit_for_bit_the_same(small, straight_run, tmp_path, before, after):
    expected = straight_run(small)
    path = small()
    process = start(path, f"data.num_workers={before}")
    wait_for_step(tmp_path / "run", 7, process)
    process.kill()
    process.communicate()
    # That of step 6 may still have been written; it was begun only after that of step 4 was whole.
    assert 4 <= checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints")) < STEPS
    run(path, f"data.num_workers={after}")
    assert_same(final_state(tmp_path / "run"), expected["state"])
    assert losses(tmp_path / "run") == expected["losses"]


@pytest.mark.slow
@pytest.mark.timeout(100)  # the death is noticed long before `data.worker_timeout`
@pytest.mark.parametrize("clip", [0, 9])  # of a worker; 0: the main process has none of its batches yet
def test_a_data_worker_that_is_killed_while_it_reads_changes_nothing(small, tmp_path, monkeypatch, caplog, clip):
    path = small(data={"num_workers": 2})
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    main(config.load(path, [f"folder={undisturbed}"], Options), World())
    read, calls, marker = TrainTransform.__call__, itertools.count(), tmp_path / "killed"

    def read_and_be_killed(self, frames, rng):
        if torch.utils.data.get_worker_info() is not None and next(calls) == clip and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, frames, rng)

    monkeypatch.setattr(TrainTransform, "__call__", read_and_be_killed)
    main(config.load(path, [f"folder={disturbed}"], Options), World())
    assert marker.exists()
    assert "are read again" in caplog.text
    assert len(losses(undisturbed)) == STEPS
    assert losses(disturbed) == losses(undisturbed)
    assert_same(final_state(disturbed), final_state(undisturbed))
    assert not (disturbed / "bad_files.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(small, straight_run, tmp_path, number):
    expected = straight_run(small)
    path = small(logging={"checkpoint_every_steps": None})
    process = start(path)
    wait_for_step(tmp_path / "run", 3, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert number.name in output
    assert "The same command continues" in output
    assert 3 <= checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints")) < STEPS
    run(path)
    assert_same(final_state(tmp_path / "run"), expected["state"])


def test_number_of_workers_changes_nothing(small, straight_run, tmp_path):
    expected = straight_run(small)["losses"]
    assert len(expected) == STEPS
    for workers in (1, 2):
        main(config.load(small(), [f"data.num_workers={workers}", f"folder={tmp_path}/{workers}"], Options), World())
        assert losses(tmp_path / str(workers)) == expected


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch(small, tmp_path):
    """Data order, augmentation and masks depend on the sample, not on the process that holds it."""
    path = small(model={"encoder_args": {"embed_dim": 48, "depth": 2, "num_heads": 2}, "pred_depth": 1})
    run(path, f"folder={tmp_path}/one", "data.batch_size=4")
    run(path, f"folder={tmp_path}/two", "data.batch_size=2", "--processes", "2")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_names_that_are_not_utf_8(small, videos, tmp_path):
    """As those of a folder, of a list, of a readable file and of an unreadable one, up to the report."""
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    for number in range(10):
        shutil.copy(videos / f"clip {number}.mp4", folder + b"/\xff%d.mp4" % number)
    Path(os.fsdecode(folder + b"/bad\xff.mp4")).write_bytes(b"no video")
    names = [*(b"\xff%d.mp4" % number for number in range(10)), b"bad\xff.mp4"]
    Path(os.fsdecode(folder + b"/\xfe.csv")).write_bytes(b"".join(b'"%s",3\n' % name for name in names))
    entries = json.dumps([os.fsdecode(folder), os.fsdecode(folder + b"/\xfe.csv")], ensure_ascii=False)
    path = small(data={"max_bad_fraction": 1.0}, optimization={"epochs": 1, "ipe": 4, "warmup": 0})
    run(path, f"data.datasets={entries}")
    assert folder + b"/bad\xff.mp4\t" in (tmp_path / "run" / "bad_files.txt").read_bytes()
    assert "data" in config.read(tmp_path / "run" / "config.yaml")
    report.write(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_run_folder_holds_what_it_should(small, tmp_path, with_report):
    options = config.load(small(logging={"loggers": ["tensorboard"]}), [], Options)
    main(options, World())
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "git.txt", "log.jsonl", "tensorboard", "checkpoints", "report.html", "report.json"}
    assert config.load(folder / "config.yaml", [], Options) == options
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert set(lines[3]) >= {"loss", "lr", "momentum", "grad_norm", "clips_per_second", "data_seconds", "memory_gb"}
    assert set(lines[0]) >= {"rank_centered", "rank_uncentered", "spread_within", "spread_across"}
    assert "rank_centered" in lines[5]
    assert "rank_centered" not in lines[4]


def new_trainer(path, *overrides):
    options = config.load(path, list(overrides), Options)
    return make_trainer(options, options.optimization.schedule(steps_per_epoch=2), World())


def parameters(trainer):
    return [p for part in trainer.trained.values() for p in part.parameters() if p.requires_grad]


def some_batch(trainer):
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 255, (4, 3, 8, 32, 32), dtype=torch.uint8, generator=generator)
    import numpy as np

    context, target = trainer.options.mask_collator().sample_masks(4, np.random.default_rng(0))
    none = torch.zeros(4, dtype=torch.int64)
    return Batch({"clip": clips}, {"label": none}, none, ("",) * 4, none, 0, (), tuple(context), tuple(target))


def test_accumulated_gradients_equal_those_of_the_whole_batch(small):
    path = small(model={"encoder_args": {"embed_dim": 48, "depth": 2, "num_heads": 2}})
    gradients = []
    for parts in (1, 4):
        trainer = new_trainer(path, f"optimization.accumulation_steps={parts}")
        losses = trainer.forward_backward(some_batch(trainer), samples=4)
        gradients.append([p.grad for p in parameters(trainer)] + [losses["loss"]])
    for whole, accumulated in zip(*gradients, strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)


def test_update_with_non_finite_gradients_is_left_out(small):
    trainer = new_trainer(small())
    trainer.forward_backward(some_batch(trainer), samples=4)
    parameters(trainer)[0].grad[0] = float("nan")
    before = [p.detach().clone() for p in parameters(trainer)]
    assert not torch.isfinite(trainer.update(float("inf")))
    assert all(torch.equal(old, new) for old, new in zip(before, parameters(trainer), strict=True))
    trainer.forward_backward(some_batch(trainer), samples=4)
    assert torch.isfinite(trainer.update(float("inf")))
    assert any(not torch.equal(old, new) for old, new in zip(before, parameters(trainer), strict=True))


def test_a_diverging_run_stops_with_a_message_and_good_weights(small, tmp_path):
    path = small(
        logging={"max_nonfinite": 3, "checkpoint_every_steps": None}, optimization={"lr": 1e30, "start_lr": 1e30}
    )
    with pytest.raises(RunStopped, match="not finite.*Lower optimization.lr"):
        main(config.load(path, ["optimization.clip_grad=null"], Options), World())
    assert (tmp_path / "run" / "checkpoints" / "latest").exists()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("use_mask_tokens", [True, False])
def test_half_precision_is_near_to_single(small, dtype, use_mask_tokens):
    model = {"encoder_args": {"embed_dim": 48, "depth": 2, "num_heads": 2}, "use_mask_tokens": use_mask_tokens}
    path = small(model=model)
    found = []
    for name in ("float32", dtype):
        trainer = new_trainer(path, f"meta.dtype={name}")
        found.append(float(trainer.forward_backward(some_batch(trainer), samples=4)["loss"]))
        trainer.update(float("inf"))
        assert all(p.dtype == torch.float32 for p in trainer.objective.parameters())
    assert found[1] == pytest.approx(found[0], rel=2e-2)


def test_a_run_is_continued_in_the_type_that_it_was_begun_with(small, monkeypatch):
    path = small(optimization={"epochs": 1, "ipe": 2, "warmup": 0})
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)
    main(config.load(path, ["meta.dtype=auto"], Options), World())
    assert new_trainer(path, "meta.dtype=float32").resume()
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)  # as on another machine
    with pytest.raises(CheckpointError, match=r"begun in float32, meta.dtype=auto is bfloat16 .*meta.dtype=float32"):
        new_trainer(path, "meta.dtype=auto").resume()


@pytest.mark.parametrize("objective", ["vjepa", "videomae"])
def test_init_from_starts_a_new_run_from_the_weights(small, tmp_path, objective):
    path = small(optimization={"epochs": 1, "ipe": 2, "warmup": 0})
    main(config.load(path, [f"objective={objective}"], Options), World())
    trainer = new_trainer(path, f"objective={objective}", f"init_from={tmp_path}/run", f"folder={tmp_path}/new")
    assert not trainer.resume()
    initialize(trainer, trainer.options, trainer.options.init_from)
    assert trainer.step == 0
    weights = checkpoint.read_weights(checkpoint.newest(tmp_path / "run" / "checkpoints"))
    assert weights.keys() == trainer.objective.parts().keys()
    for name, part in trainer.objective.parts().items():
        assert_same(part.state_dict(), weights[name])


def test_init_from_what_is_no_pretraining_is_refused(small, tmp_path):
    trainer = new_trainer(small())
    torch.save({"encoder": trainer.objective.encoder.state_dict()}, tmp_path / "encoder.pt")
    trainer = new_trainer(small(), f"init_from={tmp_path}/encoder.pt")
    with pytest.raises(ConfigError, match="init_from: .*encoder.pt has no predictor; it holds encoder, target_encoder"):
        initialize(trainer, trainer.options, trainer.options.init_from)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ("encoder.num_heads=4", "set encoder.num_heads=2"),
        ("encoder.use_rope=true", "set encoder.use_rope=false"),
        ("encoder.uniform_power=false", "set encoder.uniform_power=true"),
        ("objective.predictor.depth=2", "set objective.predictor.depth=1"),
        ("objective.predictor.num_heads=3", "set objective.predictor.num_heads=2"),
    ],
)
def test_init_from_a_run_of_another_architecture_is_refused(small, tmp_path, change, remedy):
    path = small(optimization={"epochs": 1, "ipe": 1, "warmup": 0})
    main(config.load(path, [], Options), World())
    trainer = new_trainer(path, change, f"init_from={tmp_path}/run", f"folder={tmp_path}/new")
    with pytest.raises(ConfigError, match=f"init_from: .*(.|\n)*; {remedy}"):
        initialize(trainer, trainer.options, trainer.options.init_from)


def test_init_from_warns_of_another_normalization(small, tmp_path, caplog):
    path = small(optimization={"epochs": 1, "ipe": 1, "warmup": 0})
    main(config.load(path, [], Options), World())
    colors = "data_aug.normalize_mean=[0.5, 0.5, 0.5]"
    trainer = new_trainer(path, colors, f"init_from={tmp_path}/run", f"folder={tmp_path}/new")
    initialize(trainer, trainer.options, trainer.options.init_from)
    assert "data_aug.normalize_mean is [0.485, 0.456, 0.406] in the training of the weights" in caplog.text


def test_folder_of_another_configuration_is_refused(small, tmp_path):
    main(config.load(small(), [], Options), World())
    with pytest.raises(ConfigError, match=r"optimization.lr: 0.001 there, 0.002 here"):
        main(config.load(small(), ["optimization.lr=2e-3"], Options), World())


@pytest.fixture
def collapses_at_step_5(monkeypatch):
    """The features measured from the second regular measurement on have collapsed."""
    healthy = {"residual_variance": 0.5, "spread_across": 0.3, "spread_within": 0.5, "spread_tokens": 0.5}
    steps = iter([0, 1, 2, 5, 10, 14])  # those of a run of 14 steps with monitor_every: 5

    def measure(*_):
        return healthy if next(steps) < 5 else {**healthy, "residual_variance": 0.01}

    monkeypatch.setattr(FeatureMonitor, "measure", measure)


def test_a_collapse_is_in_the_log_and_in_the_report(small, tmp_path, collapses_at_step_5, caplog, with_report):
    main(config.load(small(), [], Options), World())
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "residual_variance" in line] == [0, 1, 2, 5, 10, 14]
    events = {line["step"]: line["events"] for line in lines if "events" in line}
    assert list(events) == [5]
    message = events[5]["dimensional"]
    assert message.startswith("target_encoder: dimensional collapse after step 5")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert f"went from {losses[0]:.4g} to {sum(losses[2:5]) / 3:.4g}" in message
    assert "Remedies: raise objective.std_coeff" in message
    assert caplog.text.count(message) == 1
    report = json.loads((folder / "report.json").read_text())
    assert report["pretraining"]["events"] == [{"step": 5, "name": "dimensional", "message": message}]
    assert html.escape(message) in (folder / "report.html").read_text()


def test_a_collapse_can_stop_the_run_which_goes_on_when_asked_again(small, tmp_path, collapses_at_step_5):
    options = config.load(small(), ["logging.stop_on_collapse=true"], Options)
    with pytest.raises(RunStopped, match="(?s)dimensional collapse after step 5.*the same command goes on"):
        main(options, World())
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run" / "checkpoints")) == 5
    main(options, World())
    final_state(tmp_path / "run")
