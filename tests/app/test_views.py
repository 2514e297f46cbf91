"""Pretraining with several views of a clip, or with SIGReg: processes, resuming, monitor, hub and probe."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from app.vjepa.options import Options
from app.vjepa.train import main, make_trainer
from tests.processes import run as run_on_processes
from tubelet import config, hub
from tubelet.config import ConfigError
from tubelet.data import Batch
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.training.objective import StepRng

STEPS = 6
LEVJEPA = {
    "name": "levjepa",
    "views": {
        "global": {"count": 2, "num_frames": 6, "data_aug": {"random_resize_scale": [0.5, 1.0]}},
        "local": {"count": 1, "num_frames": 6, "crop_size": 16},
    },
    "token_drop": {"global": 0.5, "local": 0.25},
    "projector_input": "slots",
    "projector_hidden_dim": 16,
    "projector_dim": 8,
    "slot_coeff": 0.5,
}
LEJEPA = {
    "name": "lejepa",
    "predictor": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    "projector_hidden_dim": 16,
    "projector_dim": 8,
}
OBJECTIVES = {"levjepa": (LEVJEPA, []), "lejepa": (LEJEPA, [{"name": "random_tube", "ratio": 0.6}])}


@pytest.fixture
def write(videos, tmp_path):
    """`write(objective)`: path of the YAML file of a short pretraining, based on one with V-JEPA and masks."""

    def written(name):
        objective, mask = OBJECTIVES[name]
        base = {
            "app": "vjepa",
            "data": {
                "datasets": [str(videos)], "batch_size": 8, "num_frames": 8, "tubelet_size": 2, "sampling_rate": 1,
                "crop_size": 32, "patch_size": 8, "num_workers": 0,
            },
            "objective": {"name": "vjepa", "ema": [0.9, 1.0]},
            "mask": [{"num_blocks": 2, "spatial_scale": [0.3, 0.3]}],
            "encoder": {"name": "vit_tiny", "embed_dim": 48, "depth": 2, "num_heads": 2, "block_causal": True},
            "optimization": {
                "epochs": STEPS, "ipe": 1, "ipe_scale": 1.0, "warmup": 1, "start_lr": 1e-3, "lr": 1e-3,
                "clip_grad": None, "final_weight_decay": None,
            },
            "meta": {"dtype": "float32", "seed": 3},
            "logging": {"log_every": 1, "checkpoint_every_steps": 3, "monitor_every": 3, "monitor_clips": 6},
        }  # fmt: skip
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump({"base": "base.yaml", "folder": str(tmp_path / "run"), "objective": objective, "mask": mask})
        )
        return path

    return written


def log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def losses(folder):
    return [
        [value for name, value in line.items() if name.startswith("loss")] for line in log(folder) if "loss" in line
    ]


def train(path, folder, processes=1, *overrides):
    changes = [f"folder={folder}", f"data.batch_size={8 // processes}", *overrides]
    options = config.load(path, changes, Options)
    run_on_processes(main, options, processes) if processes > 1 else main(options, World())
    return losses(folder)


def weights(folder):
    return checkpoint.read(checkpoint.newest(Path(folder) / "checkpoints")).weights


@pytest.mark.parametrize("name", OBJECTIVES)
def test_run_is_measured_reported_loaded_and_resumed(write, tmp_path, name, with_report):
    path = write(name)
    straight = train(path, tmp_path / "run")
    assert len(straight) == STEPS
    assert straight[0] != straight[-1]
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines if "rank_centered" in line] == [0, 1, 3, 6]
    assert (tmp_path / "run" / "report.html").is_file()
    encoder = hub.load_encoder(tmp_path / "run")
    assert encoder.block_causal
    assert encoder(torch.randn(1, 3, 8, 32, 32)).shape == (1, 64, 48)
    parts = weights(tmp_path / "run")
    assert all(torch.equal(value, parts["encoder"][key]) for key, value in encoder.state_dict().items())

    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    assert train(path, tmp_path / "run") == straight
    for part, state in weights(tmp_path / "run").items():
        assert all(torch.equal(value, parts[part][key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("name", "processes", "kind"),
    [
        ("levjepa", 2, "ddp"),
        pytest.param("levjepa", 4, "ddp", marks=pytest.mark.slow),
        pytest.param("levjepa", 4, "fsdp", marks=pytest.mark.slow),
        pytest.param("lejepa", 2, "ddp", marks=pytest.mark.slow),
        pytest.param("lejepa", 4, "ddp", marks=pytest.mark.slow),
        pytest.param("lejepa", 2, "fsdp", marks=pytest.mark.slow),
    ],
)
def test_losses_and_weights_are_those_of_one_process(write, tmp_path, name, processes, kind):
    path = write(name)
    expected = train(path, tmp_path / "one")
    found = train(path, tmp_path / "several", processes, f"distributed={kind}")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    one, several = weights(tmp_path / "one"), weights(tmp_path / "several")
    if name == "levjepa":  # the projector's norm removes it: its gradient is zero but for rounding
        assert one["encoder"].pop("norm.bias").abs().max() < STEPS * 1e-3
    for part, state in one.items():
        for key, value in state.items():
            torch.testing.assert_close(several[part][key], value, rtol=0, atol=2e-4)


def test_accumulated_gradients_are_the_mean_of_those_of_the_parts(write):
    """Statistics over clips, of SIGReg and of the norm, are those of a part of the batch."""
    options = config.load(write("levjepa"), ["optimization.accumulation_steps=2"], Options)
    trainer = make_trainer(options, options.optimization.schedule(1), World())
    generator = torch.Generator().manual_seed(0)
    views = {
        "global": torch.randint(256, (16, 3, 6, 32, 32), generator=generator, dtype=torch.uint8),
        "local": torch.randint(256, (8, 3, 6, 16, 16), generator=generator, dtype=torch.uint8),
    }
    index = torch.arange(8)
    batch = Batch(views, {}, index, ("",) * 8, index, 0)
    loss = trainer.forward_backward(batch, samples=8)["loss"]
    gradients = [p.grad.clone() for p in trainer.objective.parameters()]

    trainer.objective.zero_grad()
    rng = StepRng(seed=3, step=0, first_sample=0)
    halves = batch.split(2)
    terms = [trainer.objective(half, rng.skip(4 * i))["loss"] for i, half in enumerate(halves)]
    (sum(terms) / 2).backward()
    torch.testing.assert_close(loss, sum(terms).detach() / 2)
    for p, gradient in zip(trainer.objective.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-6)

    whole = trainer.objective(batch, rng)["loss"]
    assert not torch.isclose(whole, loss, rtol=1e-3)


def test_batches_of_single_clips_are_refused(write, tmp_path):
    with pytest.raises(ConfigError, match=r"raise data.batch_size, or lower optimization.accumulation_steps"):
        train(write("levjepa"), tmp_path / "single", 1, "optimization.accumulation_steps=8")
