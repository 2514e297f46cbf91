"""The example of docs/extending/evaluation.md measures stored features."""

import json

import pytest
import torch

import evals.main
from tests.docs.runs import make_options, train
from tubelet.runtime import launch


def evaluate(fname, *overrides):
    launch.run(evals.main.PROGRAMS, ["--fname", fname, "--devices", "cpu", *overrides])


def test_effective_rank(checkout, clips):
    train(make_options(clips))
    evaluate(
        "configs/evals/features.yaml", "pretrain.folder=runs/example", f"data.datasets=[{clips}/motion_test.csv]",
        "data.frames_per_clip=8", "data.num_workers=0",
    )  # fmt: skip
    evaluate("configs/evals/effective_rank.yaml")
    results = json.loads((checkout / "runs/demo/effective_rank/results.json").read_text())
    assert (results["items"], results["dimension"]) == (8, 48)

    from tubelet.features.store import Store

    vectors = Store("runs/demo/features").items("mean", "video").vectors
    values = torch.linalg.svdvals(vectors - vectors.mean(0))
    values = values / values.sum()
    entropy = -sum(value * torch.log(value) for value in values if value > 0)
    assert results["effective_rank"] == pytest.approx(float(entropy.exp()), rel=1e-3)
    assert 1 < results["effective_rank"] < 8


def test_unknown_keys_are_errors(checkout):
    with pytest.raises(SystemExit, match="Did you mean 'center'"):
        evaluate("configs/evals/effective_rank.yaml", "centre=false")
