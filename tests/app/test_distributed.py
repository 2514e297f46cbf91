"""The same pretraining on one, two and four processes, replicated and sharded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from app.vjepa.options import Options
from app.vjepa.train import main
from tests.processes import run as run_on_processes
from tubelet import config, hub
from tubelet.data import bad_files
from tubelet.runtime import checkpoint

STEPS = 20
# Dropout depends on the process; every other draw on the sample and the step only.
WITHOUT_DROPOUT = {"encoder_args": {"embed_dim": 48, "depth": 2, "num_heads": 2}, "pred_depth": 1}
ALL_TERMS = {"std_coeff": 1.0, "inv_coeff": 1.0, "cov_coeff": 1.0, "reg_coeff": 0.1}


def run(path, folder, processes, *overrides, batch=8):
    """Train on so many processes with a global batch of `batch`; the losses."""
    changes = [f"folder={folder}", f"data.batch_size={batch // processes}", *overrides]
    run_on_processes(main, config.load(path, changes, Options), processes)
    return losses(folder)


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def whole_state(folder):
    return checkpoint.read(checkpoint.newest(Path(folder) / "checkpoints"))


@pytest.fixture
def plain(small):
    return small(
        model=WITHOUT_DROPOUT,
        loss=ALL_TERMS,
        optimization={"epochs": STEPS, "ipe": 1, "ipe_scale": 1.0, "warmup": 2, "lr": 1e-3},
        logging={"log_every": 5, "checkpoint_every_steps": 10, "monitor_every": 20, "monitor_clips": 6},
    )


@pytest.mark.slow
def test_losses_are_those_of_one_process(plain, tmp_path):
    expected = run(plain, tmp_path / "1", 1)
    assert len(expected) == STEPS
    for processes, kind in ((2, "ddp"), (4, "ddp"), (4, "fsdp")):
        folder = tmp_path / f"{processes}-{kind}"
        assert run(plain, folder, processes, f"distributed={kind}") == pytest.approx(expected, rel=1e-4)
    last = json.loads((tmp_path / "4-ddp" / "log.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["slowest_rank"] < 4
    assert 0 < last["data_seconds_mean"] <= last["data_seconds_slowest"] <= last["step_seconds_slowest"]
    one, sharded = whole_state(tmp_path / "1"), whole_state(tmp_path / "4-fsdp")
    for part in ("encoder", "target_encoder", "predictor"):
        for name, tensor in one.weights[part].items():
            # Where gradients are nearly zero, Adam's steps are those of their rounding errors.
            torch.testing.assert_close(sharded.weights[part][name], tensor, rtol=0, atol=5e-4)
    encoder = hub.load_encoder(tmp_path / "4-fsdp")
    assert all(torch.equal(x, sharded.weights["target_encoder"][name]) for name, x in encoder.state_dict().items())


@pytest.mark.slow
def test_a_sharded_run_goes_on_with_other_numbers_of_processes(plain, tmp_path):
    straight = run(plain, tmp_path / "1", 1)
    run(plain, tmp_path / "4", 4, "distributed=fsdp")
    # As if it had been stopped after its first checkpoint.
    shutil.rmtree(tmp_path / "4" / "checkpoints" / f"step-{STEPS:08d}")
    for processes in (2, 1):
        folder = tmp_path / str(10 + processes)
        shutil.copytree(tmp_path / "4", folder, symlinks=True)
        assert run(plain, folder, processes, "distributed=fsdp") == pytest.approx(straight, rel=1e-4)
        assert whole_state(folder).metadata["step"] == STEPS


def test_too_many_unreadable_videos_stop_all_processes_with_the_list(plain, tmp_path, monkeypatch):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/bad.mp4").write_bytes(b"no video")
    sources = config.read(plain)["data"]["datasets"] + [str(tmp_path / "broken")]
    monkeypatch.setattr(bad_files, "MIN_DRAWS", 20)
    with pytest.raises(AssertionError, match="(?s)videos drawn so far are unreadable.*bad.mp4"):
        run(plain, tmp_path / "run", 2, f"data.datasets={sources}", "data.datasets_weights=[0.8, 0.2]")
    assert whole_state(tmp_path / "run").metadata["step"] == 5


def test_another_global_batch_is_refused(plain, tmp_path):
    run(plain, tmp_path, 1)
    with pytest.raises(AssertionError, match="run's steps take 8 samples, data.batch_size times .* is 4 here"):
        run(plain, tmp_path, 1, batch=4)
