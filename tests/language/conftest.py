"""A few generated scenes, a pretrained encoder, and runs on them that take a second."""

import copy

import pytest
import torch

from tests.language.runs import BATCH, CLIP, ENCODER, LISTS
from tubelet.data.scenes.generate import Settings, write_dataset
from tubelet.models import build_encoder
from tubelet.runtime import checkpoint


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    settings = Settings(
        pretrain=0, train=12, test=6, test_combinations=0, sounding_train=0, sounding_test=6, size=32, fps=4
    )
    write_dataset(folder, settings, 1)
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A run of app.vjepa, as far as it matters here."""
    folder = tmp_path_factory.mktemp("pretraining")
    torch.manual_seed(0)
    weights = build_encoder(ENCODER, CLIP).state_dict()
    options = {name: value for name, value in ENCODER.items() if name != "name"}
    model = {"model_name": ENCODER["name"], "encoder_args": options}
    data = {"crop_size": 32, "num_frames": 4, "patch_size": 16, "tubelet_size": 2}
    metadata = {"config": {"model": model, "data": data}}
    checkpoint.save(
        folder / "checkpoints", 1, checkpoint.CheckpointState({"encoder": weights}, metadata=metadata), keep=1
    )
    return folder


@pytest.fixture
def raw(scenes, pretrained, tmp_path):
    """`raw(task, **sections)`: the configuration of a run that takes a second; sections are merged into it."""

    def configure(task="captioning", **sections):
        raw = {
            "app": "language",
            "task": task,
            "folder": str(tmp_path / "run"),
            "data": {
                "dataset_train": str(scenes / f"{LISTS[task]}_train.json"),
                "dataset_val": str(scenes / f"{LISTS[task]}_test.json"),
                "videos": str(scenes / "videos"),
                "frames_per_clip": 4,
                "frame_step": 2,
                "num_workers": 0,
            },
            "pretrain": {"folder": str(pretrained)},
            "language_model": {"vocab_size": 300, "embed_dim": 16, "depth": 1, "num_heads": 2, "dropout": 0.0},
            "pooler": {"num_queries": 2},
            "text": {"max_prompt": 12, "max_target": 24},
            "alignment": {"embed_dim": 8},
            "optimization": {"resolution": 32, "batch_size": BATCH[task], "num_epochs": 2, "lr": 3e-3, "warmup": 1},
            "logging": {"log_every": 1},
        }
        for name, change in sections.items():
            raw[name] = {**raw.get(name, {}), **change} if isinstance(change, dict) else change
        return copy.deepcopy(raw)

    return configure
