"""Pretraining with V-JEPA 2.1: done another way, the same run gives the same numbers."""

import shutil

import pytest
import torch

from app.vjepa.options import Options
from app.vjepa.train import main
from tests.app.test_distributed import losses, whole_state
from tests.processes import run as run_on_processes
from tubelet import config, hub
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World

STEPS, PARTS = 6, ("encoder", "target_encoder", "predictor")


@pytest.fixture
def path(small):
    return small(
        model={"encoder_args": {"embed_dim": 48, "depth": 4, "num_heads": 2, "levels": 4}},
        objective={"name": "vjepa2_1", "context_ramp": [1, 4]},
        optimization={"epochs": STEPS, "ipe": 1, "ipe_scale": 1.0, "warmup": 1, "lr": 1e-3},
        logging={"checkpoint_every_steps": 3, "monitor_every": STEPS, "monitor_clips": 6},
    )


def run(path, folder, processes=1, *overrides):
    options = config.load(path, [f"folder={folder}", f"data.batch_size={4 // processes}", *overrides], Options)
    if processes == 1:
        main(options, World())
    else:
        run_on_processes(main, options, processes)
    return losses(folder)


@pytest.mark.slow
def test_accumulated_replicated_and_sharded_runs_are_those_of_whole_batches(path, tmp_path):
    expected = run(path, tmp_path / "whole")
    assert len(expected) == STEPS
    state = whole_state(tmp_path / "whole").weights
    for processes, change in (
        (1, "optimization.accumulation_steps=2"),
        (2, "distributed=ddp"),
        (2, "distributed=fsdp"),
    ):
        folder = tmp_path / change
        assert run(path, folder, processes, change) == pytest.approx(expected, rel=1e-4)
        other = whole_state(folder).weights
        for part in PARTS:
            for name, tensor in state[part].items():
                torch.testing.assert_close(other[part][name], tensor, rtol=0, atol=1e-4)


def test_a_resumed_run_is_the_straight_one_bit_for_bit_also_within_the_ramp(path, tmp_path):
    expected = run(path, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed", symlinks=True)
    shutil.rmtree(tmp_path / "resumed/checkpoints" / f"step-{STEPS:08d}")
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "resumed/checkpoints")) == STEPS // 2
    assert run(path, tmp_path / "resumed") == expected
    straight, resumed = (whole_state(tmp_path / name) for name in ("straight", "resumed"))
    for part in PARTS:
        assert all(torch.equal(resumed.weights[part][name], x) for name, x in straight.weights[part].items())


def test_hub_loads_encoder_and_predictor_of_a_run(path, tmp_path):
    run(path, tmp_path / "run")
    state = whole_state(tmp_path / "run").weights
    encoder, predictor = hub.load_encoder(tmp_path / "run"), hub.load_predictor(tmp_path / "run")
    assert all(torch.equal(x, state["target_encoder"][name]) for name, x in encoder.state_dict().items())
    assert all(torch.equal(x, state["predictor"][name]) for name, x in predictor.state_dict().items())
    context, target = torch.arange(10)[None], torch.arange(10, 30)[None]
    tokens = encoder(torch.randn(1, 3, 8, 32, 32), context, all_levels=True)
    hidden, visible = predictor(tokens, None, context, target, return_context=True)
    assert (hidden.shape, visible.shape) == ((1, 20, 4 * 48), (1, 10, 4 * 48))
