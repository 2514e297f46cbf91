"""Latent diffusion of future frames end to end."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.generation import train as program
from tests.processes import run as run_on_processes
from tests.stops import stopped_at
from tubelet.config import ConfigError, check
from tubelet.runtime.distributed import World


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Files like MNIST's: 20 images of 16 x 16 with a bar whose place is its class."""
    folder = tmp_path_factory.mktemp("digits")
    labels = np.arange(20, dtype=np.uint8) % 10
    images = np.zeros((20, 16, 16), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[:, label : label + 4] = 255
    for name in ("train", "t10k"):
        (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4I", 2051, 20, 16, 16) + images.tobytes())
        (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 2049, 20) + labels.tobytes())
    return folder


@pytest.fixture
def raw(digits, tmp_path):
    return {
        "app": "generation",
        "folder": str(tmp_path / "run"),
        "data": {
            "format": "moving_mnist",
            "train": [str(digits / "train-images-idx3-ubyte")],
            "test": [str(digits / "t10k-images-idx3-ubyte")],
            "num_frames": 3,
            "num_target_frames": 2,
            "channels": 1,
            "crop_size": 64,
            "batch_size": 4,
            "num_workers": 0,
        },
        "latent": {"channels": 4, "codec_width": 8, "width": 8, "depth": 1, "sampling_steps": 2},
        "optimization": {"steps": 6, "warmup": 1, "lr": 3e-3},
        "evaluation": {
            "num_frames": 4,
            "num_clips": 6,
            "pictures": 2,
            "draws": 2,
            "digits": True,
            "classifier_steps": 3,
            "features": {
                "checkpoint": "random",
                "encoder": {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2},
                "patch_size": 16,
                "tubelet_size": 2,
            },
        },
        "logging": {"log_every": 1, "checkpoint_every_steps": 3, "monitor_every": 3, "monitor_clips": 4},
    }


def run(raw, processes=1, **sections):
    raw = raw | {
        name: raw.get(name, {}) | change if isinstance(change, dict) else change for name, change in sections.items()
    }
    options = check(raw, program.Options, "test.yaml")
    if processes == 1:
        program.main(options, World())
    else:
        run_on_processes(program.main, options, processes=processes)
    return json.loads((Path(options.folder) / "results.json").read_text())


def test_training_and_everything_that_is_measured(raw, tmp_path):
    results = run(raw)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert {"loss", "loss_pixels", "loss_latents", "loss_painted"} <= log[0].keys()
    assert [line["step"] for line in log if "test_mse" in line] == [3, 6]
    for name in ("model", "sample", "copy_last"):
        assert len(results[name]["per_frame"]["mse"]) == 4
    assert results["model"]["mse"] != results["sample"]["mse"]
    names = {"encoder", "halves_of_truth", "model", "sample", "copy_last", "linear_extrapolation", "mean_of_seen"}
    assert results["frechet_distance"].keys() == names
    assert results["frechet_distance"]["copy_last"] < results["frechet_distance"]["model"]  # after six steps
    assert results["digits"].keys() == {
        "clips", "single_digits", "fraction_apart", "truth", "model", "sample", "copy_last",
    }  # fmt: skip
    assert len(results["digits"]["truth"]["apart"]) == 4
    assert Image.open(tmp_path / "run" / "prediction.gif").width == 4 * (128 + 8)  # truth, mean, two draws


def test_a_run_that_stops_goes_on_as_if_it_had_not(raw, tmp_path):
    straight = run(raw, folder=str(tmp_path / "straight"))

    with stopped_at(4):
        run(raw)
    resumed = run(raw)
    assert straight.pop("train_seconds") > 0
    resumed.pop("train_seconds")
    assert resumed == straight


def test_two_processes_are_as_one(raw, tmp_path):
    one = run(raw, folder=str(tmp_path / "one"))
    two = run(raw, data={"batch_size": 2}, processes=2)
    assert two["clips"] == one["clips"] == 6
    assert two["model"]["per_frame"]["mse"] == pytest.approx(one["model"]["per_frame"]["mse"], rel=1e-3)
    assert two["digits"]["truth"] == one["digits"]["truth"]
    assert two["frechet_distance"]["copy_last"] == pytest.approx(one["frechet_distance"]["copy_last"], rel=1e-3)


@pytest.mark.slow
def test_a_flying_bar_is_painted_where_it_goes(raw):
    """Bars of one shape: after some training the mean is nearer to the truth than what is there already."""
    results = run(
        raw,
        latent={"width": 16, "mean_fraction": 1.0},
        optimization={"steps": 150, "warmup": 10, "lr": 5e-3},
        evaluation={"num_frames": 2, "digits": False, "features": None},
        logging={"checkpoint_every_steps": None, "monitor_every": 150},
    )
    assert "sample" not in results
    assert results["mse_below_percent"]["copy_last"] > 25, results["mse_below_percent"]


def test_other_videos_in_color(raw, videos):
    data = {"format": "video_dataset", "train": [str(videos)], "test": [str(videos)], "channels": 3, "crop_size": 32}
    evaluation = {"digits": False, "features": None, "num_frames": 3}
    results = run(raw, data=data, evaluation=evaluation, optimization={"steps": 2, "warmup": 0})
    assert np.isfinite(results["sample"]["per_frame"]["mse"]).all()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"encoder": {"name": "generative_timesformer_tiny"}}, "give either `encoder`, .* or `latent`"),
        ({"latent": None}, "give either `encoder`"),
        ({"data": {"crop_size": 36, "patch_size": 4}}, "data.crop_size: 36 is not a multiple of 8"),
        ({"latent": {"noise_steps": 3, "sampling_steps": 4}}, "latent.sampling_steps: 4 is more than latent.noise"),
        ({"latent": {"width": 12}}, "latent.width"),
        ({"data": {"channels": 3}}, "evaluation.digits: needs data.format: moving_mnist and data.channels: 1"),
        ({"data": {"crop_size": 32}}, "evaluation.digits: needs data.crop_size: 64"),
        ({"evaluation": {"num_frames": 3}}, "evaluation.features: 3 frames of 64 pixels: .*tubelet"),
    ],
)  # fmt: skip
def test_impossible_configurations_are_refused_before_training(raw, tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        run(raw, **sections)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_digits_need_labels_before_training(raw, digits, tmp_path):
    images = tmp_path / "t10k-images-idx3-ubyte"
    images.write_bytes((digits / images.name).read_bytes())
    with pytest.raises(ConfigError, match="its labels are not beside it"):
        run(raw, data={"test": [str(images)]})
    clips = tmp_path / "mnist_test_seq.npy"
    np.save(clips, np.zeros((12, 3, 64, 64), np.uint8))
    with pytest.raises(ConfigError, match="clips without labels"):
        run(raw, data={"test": [str(clips)]})
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_draws_of_torch_do_not_matter(raw, tmp_path):
    torch.manual_seed(1)
    first = run(raw)
    torch.manual_seed(2)
    second = run(raw, folder=str(tmp_path / "again"))
    first.pop("train_seconds"), second.pop("train_seconds")
    assert first == second
