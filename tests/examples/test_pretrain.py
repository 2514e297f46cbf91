"""examples/pretrain.py, executed on a few clips."""

import importlib.util
import json
import math
import sys

import pytest
import torch

from app.vjepa.options import Options
from app.vjepa.train import main as train
from tests.docs.pages import ROOT
from tubelet import config, hub
from tubelet.data.generated import Settings, write_dataset
from tubelet.runtime.distributed import World

STEPS = 6


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("pretrain_example", ROOT / "examples" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_dataset(folder, Settings(clips=40, train=16, test=8, size=32), processes=1)
    return folder


@pytest.fixture(scope="module")
def folder(example, clips, tmp_path_factory):
    """Where the example has written its weights and results."""
    folder = tmp_path_factory.mktemp("run")
    lists = [str(clips / "motion_train.csv"), str(clips / "motion_test.csv")]
    words = [str(clips / "pretrain"), "--lists", *lists, "--steps", str(STEPS), "--folder", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py", *words])
        example.main()
    return folder


def test_results(folder):
    results = json.loads((folder / "results.json").read_text())
    assert len(results["loss"]) == STEPS
    assert results["loss"][-1] < results["loss"][0]
    assert set(results["top1"]) == {"pretrained", "random"}
    assert all(0 <= top1 <= 100 for top1 in results["top1"].values())


def test_equals_a_run_of_the_trainer(example, clips, folder, tmp_path):
    """The loop of the example computes what `app.vjepa` does with the same options."""
    data = example.data_config(clips / "pretrain")
    raw = {
        "folder": str(tmp_path),
        "encoder": example.ENCODER,
        "objective": {
            "predictor": example.PREDICTOR, "ema": [0.99, 0.999], "std_coeff": 2, "inv_coeff": 2, "cov_coeff": 1,
        },
        "mask": [example.MASK, example.MASK],
        "data": data.model_dump(exclude_unset=True),
        "data_aug": example.AUGMENTATION.model_dump(exclude_unset=True),
        "optimization": {
            "epochs": 1, "ipe": STEPS, "ipe_scale": 1, "warmup": 1 / 12, "start_lr": 1e-5, "lr": 2e-3,
            "weight_decay": 0.05, "final_weight_decay": None, "clip_grad": 1, "clip_start_epoch": 0,
        },
        "meta": {"dtype": "float32", "seed": example.SEED},
        "logging": {"monitor_clips": 0},
    }  # fmt: skip
    train(config.check(raw, Options, "the options"), World())
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert json.loads((folder / "results.json").read_text())["loss"] == pytest.approx(losses, rel=1e-4)
    video = torch.randn(2, 3, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    features = {}
    for part in ("target_encoder", "encoder"):
        # Features, as some weights have no influence on the loss (biases of the keys), and follow rounding errors.
        features[part], expected = (hub.load_encoder(where, part).eval()(video) for where in (folder, tmp_path))
        torch.testing.assert_close(features[part], expected, rtol=1e-3, atol=1e-3)
    assert (features["target_encoder"] - features["encoder"]).abs().mean() > 0.01


def test_linear_probe_reads_what_is_in_the_features(example, clips, monkeypatch):
    """Classes that one channel tells are read from it; from features without them, they are not."""
    labels = torch.arange(200) % 4
    noise = torch.randn(200, 1, 12, generator=torch.Generator().manual_seed(0))
    for strength, low, high in ((3.0, 90, 100), (0.0, 0, 50)):
        tokens = noise.clone()
        tokens[:, 0, :4] += strength * torch.nn.functional.one_hot(labels, 4)
        parts = {"train": (tokens[:100], labels[:100]), "test": (tokens[100:], labels[100:])}
        monkeypatch.setattr(example, "mean_tokens", lambda encoder, split, parts=parts: parts[split])
        assert low <= example.linear_probe(None, "train", "test") <= high


def test_videos_without_labels(example, clips, tmp_path, monkeypatch):
    words = [str(clips / "pretrain"), "--steps", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    example.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert math.isfinite(results["loss"][0])
    assert "top1" not in results
