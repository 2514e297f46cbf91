import copy
import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from app.classification import train as program
from tubelet.config import ConfigError, check
from tubelet.training import checkpoint
from tubelet.training.distributed import World


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """Dark (0) and bright (1) videos of noise."""
    folder = tmp_path_factory.mktemp("dark and bright")
    rng = np.random.default_rng(0)
    for name, count in (("train", 12), ("val", 6)):
        lines = []
        for i in range(count):
            path = folder / f"{name}{i}.mp4"
            with av.open(str(path), "w") as container:
                stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
                stream.width = stream.height = 32
                for _ in range(4):
                    pixels = rng.integers(0, 90, (32, 32, 3)).astype(np.uint8) + 120 * (i % 2)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels.astype(np.uint8), format="rgb24")))
                container.mux(stream.encode(None))
            lines.append(f'"{path}" {i % 2}\n')
        (folder / f"{name}.csv").write_text("".join(lines))
    return folder


@pytest.fixture
def raw(lists, tmp_path):
    return {
        "app": "classification",
        "folder": str(tmp_path / "run"),
        "data": {
            "dataset_train": str(lists / "train.csv"),
            "dataset_val": str(lists / "val.csv"),
            "num_classes": 2,
            "frames_per_clip": 4,
            "frame_step": 1,
            "patch_size": 16,
            "num_workers": 0,
        },
        "model": {"model_name": "vit_tiny", "encoder_args": {"embed_dim": 24, "depth": 1, "num_heads": 2}},
        "optimization": {"resolution": 32, "batch_size": 4, "num_epochs": 8, "lr": 3e-3, "warmup": 1},
    }


def run(raw, **sections):
    raw = copy.deepcopy(raw)
    for name, change in sections.items():
        raw[name] = {**raw.get(name, {}), **change} if isinstance(change, dict) else change
    program.main(check(raw, program.Options, "test.yaml"), World())
    return json.loads((Path(raw["folder"]) / "results.json").read_text())


def test_brightness_is_learned_from_few_labels(raw):
    results = run(raw, data={"labels_per_class": 4})
    assert (results["top1"], results["num_train"], results["num_val"]) == (100, 8, 6)
    assert results["train_loss"] < 0.3


class Stopped(Exception):
    pass


def test_going_on_after_a_stop_is_as_never_stopping(raw, tmp_path, monkeypatch):
    sections = {"meta": {"save_every_minutes": 0.0}, "data_aug": {}}
    run(raw, folder=str(tmp_path / "straight"), **sections)
    save = checkpoint.save

    def stop_after_three(folder, step, *rest, **more):
        save(folder, step, *rest, **more)
        if step == 3:
            raise Stopped

    monkeypatch.setattr(checkpoint, "save", stop_after_three)
    with pytest.raises(Stopped):
        run(raw, **sections)
    monkeypatch.setattr(checkpoint, "save", save)
    run(raw, **sections)
    for part in ("encoder", "classifier"):
        ours, theirs = (
            checkpoint.load_latest(Path(folder) / "checkpoints")[part]
            for folder in (raw["folder"], tmp_path / "straight")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_shape_that_cannot_be_cut_is_named(raw):
    with pytest.raises(ConfigError, match="optimization.resolution.*40"):
        run(raw, optimization={"resolution": 40})
