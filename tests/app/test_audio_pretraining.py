"""Pretraining on videos with sound, and its encoders in the tasks of the audio program."""

import copy
import json
from pathlib import Path

import matplotlib.figure  # noqa: F401 - imported once for all processes, which are forked
import pytest
import torch

from app.audio import train as tasks
from app.audio.model import build_model
from app.vjepa import train as pretraining
from app.vjepa.options import Options
from tests.app.conftest import RATE, classification
from tests.processes import run as run_on_processes
from tests.stops import stopped_at
from tubelet import hub
from tubelet.config import ConfigError, check
from tubelet.probing.encoder import with_normalization
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World

ENCODER = {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2, "init_std": 0.1}
MASK = {"num_blocks": 1, "spatial_scale": [0.5, 0.5]}


@pytest.fixture
def raw(sounding, tmp_path):
    return options(sounding, tmp_path / "run")


def options(sounding, folder):
    """Options of a pretraining of 8 steps."""
    return {
        "folder": str(folder),
        "data": {
            "datasets": [str(sounding / "train.csv")],
            "format": {"name": "sounding_videos", "sample_rate": RATE, "channels": 2},
            "batch_size": 4,
            "num_frames": 4,
            "fps": 8,
            "crop_size": 32,
            "num_workers": 0,
        },
        "mask": [MASK, MASK],
        "encoder": ENCODER,
        "objective": {
            "name": "audio_visual_jepa",
            "predictor": {"depth": 1, "embed_dim": 16, "num_heads": 2},
            "sound_encoder": ENCODER,
            "spectrogram": {"window": 0.0625, "hop": 0.03125, "num_bands": 16, "patch_size": 4},
            "sound_mask": [MASK, MASK],
            "std_coeff": 1.0,
            "cov_coeff": 1.0,
        },
        "optimization": {"epochs": 2, "ipe": 4, "warmup": 1, "lr": 1e-3},
        "meta": {"dtype": "float32"},
        "logging": {"log_every": 1, "checkpoint_every_steps": 1, "monitor_every": 4, "monitor_clips": 6},
    }


def run(raw, folder, **data):
    raw = copy.deepcopy(raw) | {"folder": str(folder)}
    raw["data"] |= data
    pretraining.main(check(raw, Options, "test.yaml"), World())
    return losses(folder)


def losses(folder):
    return [line["loss"] for line in steps(folder)]


def steps(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def weights(folder):
    return checkpoint.read(checkpoint.newest(Path(folder) / "checkpoints")).weights


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for part in ours:
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items()), part


def test_going_on_after_a_stop_is_as_never_stopping_with_any_number_of_workers(raw, tmp_path):
    straight = run(raw, tmp_path / "straight")
    assert len(straight) == 8
    terms = {"loss_video", "loss_sound", "spread_video", "spread_sound", "loss_std"}
    assert terms < steps(tmp_path / "straight")[0].keys()
    with stopped_at(5):
        run(raw, tmp_path / "stopped")
    run(raw, tmp_path / "stopped", num_workers=2)
    assert_same_weights(weights(tmp_path / "stopped"), weights(tmp_path / "straight"))


def test_two_processes_do_what_one_does(raw, tmp_path):
    alone = run(raw, tmp_path / "alone")
    raw["data"]["batch_size"] //= 2
    run_on_processes(pretraining.main, check(raw, Options, "test.yaml"), 2)
    assert losses(raw["folder"]) == pytest.approx(alone, rel=1e-4)


def test_several_clips_of_a_video_are_refused(raw, tmp_path):
    with pytest.raises(ConfigError, match="data.num_clips: 2 clips of a video"):
        run(raw, tmp_path / "run", num_clips=2)


@pytest.fixture(scope="module")
def pretrained(sounding, tmp_path_factory):
    """Folder of a pretraining."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    run(options(sounding, folder), folder)
    return folder


@pytest.fixture
def task(pretrained, sounding, tmp_path):
    """Options of classification with the frozen encoders of the pretraining."""
    pretrain = {"folder": str(pretrained)}
    return classification(sounding, tmp_path / "task") | {
        "pretrain": pretrain,
        "sound_pretrain": dict(pretrain),
        "train_encoder": False,
        "optimization": {"resolution": 32, "batch_size": 8, "num_epochs": 1, "warmup": 0},
    }


def build(task):
    return build_model(with_normalization(check(task, tasks.Options, "test.yaml")))


def test_frozen_encoders_are_those_of_the_pretraining_and_stay_so(task, pretrained):
    trained, model = weights(pretrained), build(task)
    for encoder, part in ((model.encoder, "target_encoder"), (model.sound_encoder, "target_sound_encoder")):
        assert all(torch.equal(encoder.state_dict()[name], value) for name, value in trained[part].items())
        assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not model.train().sound_encoder.training
    tasks.main(check(task, tasks.Options, "test.yaml"), World())
    assert weights(task["folder"]).keys() == {"fusion"}


def test_random_encoders_have_the_architecture_and_the_spectrogram_of_the_run(task):
    trained = build(task).sound_encoder
    task["sound_pretrain"] |= {"checkpoint": "random"}
    first, again = build(task).sound_encoder, build(task).sound_encoder
    task["sound_pretrain"]["init_seed"] = 1
    other = build(task).sound_encoder
    assert first.built_from == trained.built_from
    name = "encoder.blocks.0.attn.qkv.weight"
    values = [encoder.state_dict()[name] for encoder in (first, again, other, trained)]
    assert torch.equal(values[0], values[1])
    assert not any(torch.equal(values[0], value) for value in values[2:])


def test_encoders_that_are_tuned_can_be_loaded_and_take_longer_clips(task, pretrained):
    task |= {"train_encoder": True}
    task["data"] |= {"frames_per_clip": 8}
    tasks.main(check(task, tasks.Options, "test.yaml"), World())
    tuned, start = hub.load_sound_encoder(task["folder"]), weights(pretrained)
    name = "encoder.blocks.0.attn.qkv.weight"
    assert not torch.equal(tuned.state_dict()[name], start["target_sound_encoder"][name])
    assert tuned(torch.zeros(1, 2, RATE)).shape == (1, 8 * 4, 24)


def test_another_run_starts_from_both_encoders_of_the_same_architecture(raw, pretrained, tmp_path):
    raw |= {
        "init_from": str(pretrained),
        "optimization": {"epochs": 1, "ipe": 1, "warmup": 0, "start_lr": 1e-9, "lr": 1e-9},
    }
    run(raw, tmp_path / "further")
    ours, theirs = weights(tmp_path / "further"), weights(pretrained)
    for part in ("target_encoder", "target_sound_encoder"):
        torch.testing.assert_close(dict(ours[part]), dict(theirs[part]), rtol=0, atol=1e-2)
    raw["objective"] |= {"sound_encoder": {**ENCODER, "num_heads": 3}}
    with pytest.raises(ConfigError, match="sound_encoder.num_heads is 2 in the training of the weights, here 3"):
        run(raw, tmp_path / "other")


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("sound", {"channels": 1}, "sound.channels: 1, but the encoder of .* trained with 2; set it to 2"),
        ("sound", {"sample_rate": 2 * RATE}, "sound.sample_rate: 16000, but .* with 8000"),
        ("data", {"frames_per_clip": 3}, "is not divisible"),
        ("sound_pretrain", {"checkpoint_key": "fusion"}, "'fusion' is not in it"),
        ("sound_pretrain", {"folder": "nowhere"}, "nowhere"),
    ],
)
def test_sound_of_another_kind_than_in_pretraining_is_refused(task, section, change, message):
    task[section] |= change
    with pytest.raises(Exception, match=message):
        build(task)
