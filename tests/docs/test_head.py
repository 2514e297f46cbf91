"""The example of docs/extending/head.md is trained in a probe and in supervised training."""

import json

import pytest
import torch

import app.main
import evals.main
from tubelet import hub
from tubelet.runtime import launch

NAME = "ideas.max_head.max_head"
DATA = ["data.frames_per_clip=8", "data.num_workers=0", f"head.name={NAME}"]


def test_probe(checkout, clips):
    launch.run(
        evals.main.PROGRAMS,
        [
            "--fname", "configs/evals/demo.yaml", "--devices", "cpu", "folder=runs/probe", *DATA, "head.dropout=0.1",
            f"data.dataset_train={clips}/motion_train.csv", f"data.dataset_val={clips}/motion_test.csv",
            "data.cache=null", "optimization.num_epochs=1", "optimization.min_steps=1", "optimization.warmup=0",
            "optimization.select=val", "pretrain.folder=null", "pretrain.checkpoint=random",
            "pretrain.encoder={name: vit_tiny, embed_dim: 48, depth: 1, num_heads: 2}", "pretrain.patch_size=8",
        ],
    )  # fmt: skip
    assert json.loads((checkout / "runs/probe/results.json").read_text())["num_val"] == 8
    head = hub.load_probe("runs/probe")
    assert type(head).__name__ == "MaxHead"
    assert head.dropout.p == 0.1
    tokens = torch.randn(2, 10, 48)
    expected = head.linear(head.norm(tokens).max(dim=1).values)
    torch.testing.assert_close(head.eval()(tokens), expected)


def test_supervised(checkout, clips):
    launch.run(
        app.main.PROGRAMS,
        [
            "--fname", "configs/supervised/demo.yaml", "--devices", "cpu", "folder=runs/supervised", *DATA,
            f"data.dataset_train={clips}/motion_train.csv", f"data.dataset_val={clips}/motion_test.csv",
            "optimization.num_epochs=1", "optimization.warmup=0", "optimization.batch_size=8", "data.patch_size=8",
            "encoder={name: vit_tiny, embed_dim: 48, depth: 1, num_heads: 2}",
        ],
    )  # fmt: skip
    results = json.loads((checkout / "runs/supervised/results.json").read_text())
    assert 0 <= results["top1"] <= 100


def test_options(checkout):
    with pytest.raises(SystemExit, match="Did you mean 'dropout'"):
        launch.run(evals.main.PROGRAMS, ["--fname", "configs/evals/demo.yaml", f"head.name={NAME}", "head.dropot=0.1"])
