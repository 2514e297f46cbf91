"""Stages of one run: the same as runs that are started one after another, wherever they are interrupted."""

import pytest
import torch

from app.vjepa.options import Options
from app.vjepa.train import main
from tubelet import config, hub
from tubelet.config import ConfigError
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.training.trainer import Trainer

LONGER = {"data": {"num_frames": 12, "crop_size": 48, "batch_size": 2}, "optimization": {"epochs": 1, "ipe": 4}}
LAST = {**LONGER, "data": {**LONGER["data"], "num_frames": 14}}
STAGES = [{"name": "longer", **LONGER}, {"name": "last", **LAST}]


class Interruption(Exception):
    """Stands for a kill."""


@pytest.fixture
def staged(small):
    """Path of a run of three steps with two further stages of four steps each."""
    return small(stages=STAGES, optimization={"epochs": 1, "ipe": 3})


def weights(folder):
    return checkpoint.read(folder / "checkpoints" / "latest").weights


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for part in a:
        assert a[part].keys() == b[part].keys()
        for name, tensor in a[part].items():
            assert torch.equal(tensor, b[part][name]), (part, name)


def train(path, *overrides):
    main(config.load(path, overrides, Options), World())


@pytest.mark.parametrize("rope", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stages_equal_runs_that_start_from_each_other(small, staged, tmp_path, rope):
    rope = f"encoder.use_rope={rope}".lower()
    train(staged, rope)
    train(staged, rope, "stages=[]", f"folder={tmp_path}/first")
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "first"))
    stage = small("stage.yaml", data=LONGER["data"], optimization=LONGER["optimization"])
    train(stage, rope, f"folder={tmp_path}/second", f"init_from={tmp_path}/first")
    assert_equal(weights(tmp_path / "run" / "longer"), weights(tmp_path / "second"))
    train(stage, rope, "data.num_frames=14", f"folder={tmp_path}/third", f"init_from={tmp_path}/second")
    assert_equal(weights(tmp_path / "run" / "last"), weights(tmp_path / "third"))
    video = torch.randn(1, 3, 14, 48, 48)
    encoder = hub.load_encoder(tmp_path / "run" / "last")
    assert encoder(video).shape == (1, 7 * 6 * 6, 48)


@pytest.mark.slow
@pytest.mark.parametrize("interrupted", [4, 8])
def test_an_interruption_in_any_stage_changes_nothing(staged, tmp_path, monkeypatch, interrupted):
    train(staged, f"folder={tmp_path}/straight")
    steps = iter(range(20))

    def interrupted_step(trainer, batch):
        if next(steps) == interrupted:
            raise Interruption
        return train_step(trainer, batch)

    train_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", interrupted_step)
    with pytest.raises(Interruption):
        train(staged)
    train(staged)
    for stage in ("", "longer", "last"):
        assert_equal(weights(tmp_path / "run" / stage), weights(tmp_path / "straight" / stage))


def test_a_stage_can_be_added_to_a_finished_run(staged, tmp_path):
    train(staged, "stages=[]")
    before = weights(tmp_path / "run")
    train(staged)
    assert_equal(weights(tmp_path / "run"), before)
    assert (tmp_path / "run" / "longer" / "checkpoints").is_dir()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"name": "longer", "data": {"num_frames": 15}}, r"stages.0.data.*15"),
        ({"name": "longer", "data": {"num_frame": 16}}, r"stages.0.data.num_frame.*num_frames"),
        ({"name": "longer", "stages": [{"name": "more"}]}, r"stages.0.stages: .*remove it"),
        ({"data": {"num_frames": 16}}, r"stages.0.name: None: give"),
        ({"name": "checkpoints"}, r"stages.0.name: 'checkpoints': give"),
        ({"name": ""}, r"stages.0.name: '': give"),
        ({"name": ".."}, r"stages.0.name: '\.\.': give"),
        ({"name": "config.yaml"}, r"stages.0.name: 'config.yaml': give"),
        ({"name": "../run"}, r"stages.0.name: '\.\./run': give"),
    ],
)
def test_invalid_stages_are_found_before_the_first_step(small, stage, message):
    with pytest.raises(ConfigError, match=message):
        config.load(small(stages=[stage]), [], Options)


def test_names_of_stages_differ(small):
    with pytest.raises(ConfigError, match="stages: two stages have the same name"):
        config.load(small(stages=[{"name": "longer"}] * 2), [], Options)
