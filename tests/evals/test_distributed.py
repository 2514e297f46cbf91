"""The same probe on one, two and three processes, with batches and videos that they do not divide."""

import copy
import csv
import json
from pathlib import Path

import matplotlib.figure  # noqa: F401 - imported once for all processes, which are forked
import pytest
import torch

from evals.baselines import eval as baselines
from evals.image_classification_frozen import eval as of_images
from evals.video_classification_frozen import eval as of_videos
from tests.processes import run as run_on_processes
from tubelet import hub
from tubelet.config import check
from tubelet.probing import fit

GLOBAL_BATCH = 6


@pytest.fixture
def uneven(raw, labelled, tmp_path):
    """16 training and 11 validation videos in batches of six, and a broken file in each list."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for name, count in (("train", 16), ("val", 11)):
        lines = (labelled / f"{name}.csv").read_text().splitlines()[:count]
        (tmp_path / f"{name}.csv").write_text("\n".join([*lines[:3], "broken.mp4 0", *lines[3:]]))
        raw["data"][f"dataset_{name}"] = str(tmp_path / f"{name}.csv")
    raw["data"]["on_bad_video"] = "exclude"
    return raw


def probe(raw, folder, processes, program=of_videos, **sections):
    raw = copy.deepcopy(raw) | {"folder": str(folder)}
    for name, change in sections.items():
        raw[name] = {**raw.get(name, {}), **change} if isinstance(change, dict) else change
    raw["optimization"]["batch_size"] = GLOBAL_BATCH // processes
    run_on_processes(program.main, check(raw, program.Options, "test.yaml"), processes)
    return measured(folder)


def measured(folder):
    """What a folder's files say, less what the time of day is in."""
    results = json.loads((Path(folder) / "results.json").read_text())
    results.pop("seconds")
    results.pop("inputs")  # names the folder's own feature cache
    with open(Path(folder) / "predictions.csv", newline="") as file:
        predictions = list(csv.DictReader(file))
    for row in predictions:
        row["probability"] = pytest.approx(float(row["probability"]), abs=2e-3)
    losses = {"train_loss": 1e-4, "holdout_loss": 1e-4, "holdout_train_loss": 1e-4}
    for place in (results, *results["heads"]):
        for name, tolerance in losses.items():
            if name in place:
                place[name] = pytest.approx(place[name], abs=tolerance)
    return results, predictions


@pytest.mark.parametrize("cached", [False, True])
def test_results_and_predictions_are_those_of_one_process(uneven, cached, tmp_path):
    more = {"data": {"cache_features": cached}} if cached else {"data_aug": {"horizontal_flip": False}}
    expected = probe(uneven, tmp_path / "1", 1, **more)
    assert (expected[0]["num_train"], expected[0]["num_val"], len(expected[1])) == (16, 11, 11)
    assert [bad["split"] for bad in expected[0]["excluded"]] == ["train", "val"]
    for processes in (2, 3) if cached else (3,):
        assert probe(uneven, tmp_path / str(processes), processes, **more) == expected
    one, three = (hub.load_probe(tmp_path / n).state_dict() for n in "13")
    for name, weight in one.items():
        torch.testing.assert_close(three[name], weight, atol=1e-4, rtol=0)


def test_a_linear_head_chosen_on_held_out_videos_too(uneven, tmp_path):
    choice = {"optimization": {"select": "holdout"}, "head": "linear"}
    expected = probe(uneven, tmp_path / "1", 1, **choice)
    assert "holdout_top1" in expected[0]["heads"][0]
    shared = {"data": {"cache_features": str(tmp_path / "features")}}
    assert probe(uneven, tmp_path / "2", 2, **choice, **shared) == expected
    files = set((tmp_path / "features").iterdir())
    assert len(files) == 4  # of training and validation, one of each process
    assert probe(uneven, tmp_path / "3", 3, **choice, **shared) == expected
    assert set((tmp_path / "features").iterdir()) == files  # nothing is computed again


@pytest.mark.parametrize(
    "head", ["linear_slots", {"name": "knn", "k": [1, 2, 5], "temperature": 0.5}], ids=["linear_slots", "knn"]
)
@pytest.mark.parametrize("across", [True, False])
def test_other_heads_and_shuffled_frames_too(uneven, head, across, tmp_path):
    choice = {
        "head": head,
        "optimization": {"select": "holdout", "attend_across_segments": across},
        "evaluation": {"shuffle_frames": True},
        "data": {"cache_features": across},
    }
    expected = probe(uneven, tmp_path / "1", 1, **choice)
    assert 0 <= expected[0]["shuffled_top1"] <= 100
    assert probe(uneven, tmp_path / "3", 3, **choice) == expected


def test_a_stopped_probe_goes_on_with_another_number_of_processes(uneven, tmp_path, monkeypatch):
    always = {"meta": {"save_every_minutes": 0.0}}
    expected = probe(uneven, tmp_path / "1", 1, **always)
    save = fit.Fitter._save

    def stop_in_the_second_epoch(self, stage, now, *rest):
        save(self, stage, now, *rest)
        if now.step == 4:
            raise SystemExit(3)

    monkeypatch.setattr(fit.Fitter, "_save", stop_in_the_second_epoch)
    with pytest.raises(AssertionError, match="SystemExit: 3"):
        probe(uneven, tmp_path / "2", 2, **always)
    monkeypatch.setattr(fit.Fitter, "_save", save)
    assert probe(uneven, tmp_path / "2", 3, **always) == expected


def test_images_too(raw, images, tmp_path):
    raw["eval_name"] = "image_classification_frozen"
    raw["data"] |= {"dataset_train": str(images / "train"), "dataset_val": str(images / "val")}
    raw["data"] |= {"num_classes": 2, "num_segments": 1, "dataset_type": "image_dataset"}
    expected = probe(raw, tmp_path / "1", 1, of_images)
    assert probe(raw, tmp_path / "3", 3, of_images) == expected


def test_the_process_that_meets_a_broken_video_ends_all_and_is_named(uneven, tmp_path, capfd):
    with pytest.raises(AssertionError):
        probe(uneven, tmp_path / "2", 2, data={"on_bad_video": "raise"}, distributed={"timeout": 2.0})
    stderr = capfd.readouterr().err
    assert "job aborted: rank 1: " in stderr
    assert "broken.mp4" in stderr


def test_baselines_are_those_of_one_process(labelled, tmp_path):
    task = {"train": str(labelled / "train.csv"), "test": str(labelled / "val.csv"), "num_classes": 3}
    raw = {"eval_name": "baselines", "num_frames": 4, "tasks": {"all": task, "few": {**task, "label_fraction": 0.5}}}
    found = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        options = check(raw | {"folder": str(folder)}, baselines.Options, "test.yaml")
        run_on_processes(baselines.main, options, processes)
        found.append(json.loads((folder / "results.json").read_text()))
    assert found[0] == found[1]
