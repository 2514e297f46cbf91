"""SALT in two stages: VideoMAE's encoder as teacher, resumed, on two processes, and with the wrong teacher."""

import json
import shutil

import pytest
import torch

from app.vjepa.options import Options
from app.vjepa.train import main
from tests.app.test_vjepa import assert_same, final_state, losses
from tests.processes import run as run_on_processes
from tubelet import config, hub
from tubelet.config import ConfigError
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointError
from tubelet.runtime.distributed import World

TEACHER = {"name": "vit_tiny", "embed_dim": 36, "depth": 1, "num_heads": 2}
STUDENT = {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2, "drop_rate": 0.1}
SMALL = {"depth": 1, "embed_dim": 16, "num_heads": 2}


@pytest.fixture
def teacher(small, tmp_path):
    """Run folder of the first stage."""
    objective = {"name": "videomae", "decoder": SMALL}
    main(load(small(), tmp_path / "stage1", TEACHER, objective, "optimization.epochs=1"), World())
    return tmp_path / "stage1"


@pytest.fixture
def stage2(small, teacher):
    """`stage2(folder, *overrides)`: options of the second stage."""
    objective = {"name": "salt", "teacher": {"folder": str(teacher)}, "predictor": SMALL, "ema": 0.9}
    return lambda folder, *overrides: load(small(), folder, STUDENT, objective, *overrides)


def load(path, folder, encoder, objective, *overrides):
    parts = [f"encoder={json.dumps(encoder)}", f"objective={json.dumps(objective)}"]
    return config.load(path, [f"folder={folder}", *parts, *overrides], Options)


def test_second_stage(stage2, teacher, tmp_path):
    main(stage2(tmp_path / "straight", "logging.keep_checkpoints=99"), World())
    expected = final_state(tmp_path / "straight")
    assert set(expected["weights"]) == {"ema_encoder", "encoder", "predictor"}
    assert expected["metadata"]["encoders"] == ["ema_encoder", "encoder"]

    shutil.copytree(tmp_path / "straight", tmp_path / "resumed", symlinks=True)
    for path in checkpoint.find(tmp_path / "resumed" / "checkpoints"):  # as if it had been stopped after step 6
        if checkpoint.step_of(path) > 6:
            shutil.rmtree(path)
    main(stage2(tmp_path / "resumed"), World())
    assert_same(final_state(tmp_path / "resumed"), expected)

    encoder, predictor = hub.load_encoder(tmp_path / "resumed"), hub.load_predictor(tmp_path / "resumed")
    assert_same(encoder.state_dict(), expected["weights"]["ema_encoder"])
    assert predictor.predictor_proj.out_features == 36

    moved = shutil.copytree(teacher, tmp_path / "moved", symlinks=True)
    main(stage2(tmp_path / "resumed", f"objective.teacher.folder={moved}"), World())  # the same weights elsewhere
    weights = checkpoint.read(checkpoint.newest(moved / "checkpoints"))
    weights.weights["encoder"]["norm.bias"][0] += 1e-3
    checkpoint.save(moved / "checkpoints", step=99, state=weights, keep=1)
    with pytest.raises(
        CheckpointError, match=r"objective\.teacher is another encoder, .*objective\.teacher\.checkpoint"
    ):
        main(stage2(tmp_path / "resumed", f"objective.teacher.folder={moved}"), World())


def test_two_processes_learn_what_one_does(stage2, tmp_path):
    """With the loss on visible tokens, too, whose weight is 0 in the first steps."""
    without_dropout = "encoder.drop_rate=0.0"  # which depends on the process
    dense = "objective.context_coeff=0.5", "objective.context_ramp=[1, 4]"
    for count, kind in ((1, "ddp"), (2, "ddp"), (2, "fsdp")):
        batch, folder = f"data.batch_size={4 // count}", tmp_path / f"{count}-{kind}"
        options = stage2(folder, batch, without_dropout, *dense, f"distributed={kind}", "optimization.epochs=3")
        run_on_processes(main, options, count)
        assert losses(folder) == pytest.approx(losses(tmp_path / "1-ddp"), rel=1e-4)
    assert hub.load_predictor(tmp_path / "2-fsdp").predict_context
    average, one = (hub.load_encoder(tmp_path / folder).state_dict() for folder in ("2-fsdp", "1-ddp"))
    for name, tensor in one.items():
        torch.testing.assert_close(average[name], tensor, rtol=0, atol=1e-4)


def test_a_teacher_with_other_colors_or_tokens_is_refused(stage2, tmp_path):
    mean = "data_aug.normalize_mean=[0.5,0.5,0.5]"
    with pytest.raises(
        ConfigError, match=r"objective\.teacher was .*set data_aug\.normalize_mean=\[0\.485, 0\.456, 0\.4"
    ):
        stage2(tmp_path / "run", mean)
    with pytest.raises(ConfigError, match=r"objective\.teacher: its tokens cover 2 x 8 x 8 .*encoder 4 x 8 x 8"):
        stage2(tmp_path / "run", "data.tubelet_size=4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(config.UserError, match=r"empty: neither a run folder"):
        stage2(tmp_path / "run", f"objective.teacher.folder={tmp_path}/empty")
