"""Captioning, question answering and retrieval: training, resuming, processes, cached features, controls."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from app.language import train as program
from tests.language.runs import ENCODER, LISTS, TASKS, last_weights, losses, predictions, results, run
from tests.processes import run as run_on_processes
from tests.stops import stopped_at
from tubelet import hub
from tubelet.config import check
from tubelet.data.generated_files import encode
from tubelet.objectives.losses.contrastive import ContrastiveLoss


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_and_is_measured(raw, task):
    found = run(raw(task, optimization={"num_epochs": 10}))
    expected = {
        "captioning": {"bleu4", "rouge_l", "cider", "exact_match"},
        "question_answering": {"accuracy", "by_type", "questions_by_type"},
        "retrieval": {f"{way}_r1" for way in ("text_to_video", "video_to_text")},
    }[task]
    assert expected <= found.keys()
    counts = {"captioning": (24, 6), "question_answering": (72, 36), "retrieval": (24, 6)}
    assert (found["num_train"], found["num_val"], found["excluded"]) == (*counts[task], [])
    folder = Path(raw()["folder"])
    steps = losses(folder)
    assert sum(steps[-3:]) < sum(steps[:3])
    page = (folder / "examples.html").read_text()
    assert page.count("data:image/gif;base64,") == min(16, counts[task][1])
    if task != "retrieval":
        assert len(predictions(folder)) == counts[task][1]
    if task == "question_answering":
        types = {"count", "color", "shape", "direction", "camera", "order"}
        assert found["by_type"].keys() == types
        assert found["questions_by_type"] == dict.fromkeys(types, 6)
        mean = sum(found["by_type"].values()) / 6
        assert found["accuracy"] == pytest.approx(mean)


# Questions take twice as long as captions and differ from them in the lists alone.
MOSTLY_FAST = [pytest.param(t, marks=pytest.mark.slow) if t == "question_answering" else t for t in TASKS]


@pytest.mark.parametrize("task", MOSTLY_FAST)
def test_going_on_after_a_stop_is_as_never_stopping(raw, task, tmp_path):
    changes = {
        "language_model": {"dropout": 0.2},
        "train_encoder": True,
        "data_aug": {},
        "logging": {"checkpoint_every_steps": 1},
    }
    straight = run(raw(task, folder=str(tmp_path / "straight"), **changes))
    with stopped_at(5):
        run(raw(task, **changes))
    assert run(raw(task, **changes)) == straight
    folder = raw()["folder"]
    assert losses(folder) == losses(tmp_path / "straight")
    ours, theirs = last_weights(folder), last_weights(tmp_path / "straight")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[part][name], x) for part in theirs for name, x in theirs[part].items())
    assert run(raw(task, **changes)) == straight  # once more, from the end


@pytest.mark.parametrize("task", MOSTLY_FAST)
def test_two_processes_do_what_one_does(raw, task, tmp_path, monkeypatch):
    """With the other pairs of both processes as negatives, and sampled texts."""
    pairs = []
    forward = ContrastiveLoss.forward

    def noted(self, first, *others):
        pairs.append(len(first))
        return forward(self, first, *others)

    monkeypatch.setattr(ContrastiveLoss, "forward", noted)
    changes = {
        "decoding": {"sample": True},
        "train_encoder": True,
        "evaluation": {"swap_videos": True, "batch_size": 5},
    }
    changes["optimization"] = {"layer_decay": 0.7}
    one = run(raw(task, folder=str(tmp_path / "1"), **changes))
    two = raw(task, folder=str(tmp_path / "2"), **changes)
    two["optimization"]["batch_size"] //= 2
    run_on_processes(program.main, check(two, program.Options, "test.yaml"), 2)
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-4)
    found = results(tmp_path / "2")
    assert found["lists"] == one["lists"]
    if task == "retrieval":
        assert set(pairs) == {6}
        assert found == one
    else:
        same = [a == b for a, b in zip(predictions(tmp_path / "1"), predictions(tmp_path / "2"), strict=True)]
        assert sum(same) >= 0.8 * len(same)  # a draw may fall between the rounding errors


@pytest.mark.parametrize("task", MOSTLY_FAST)
def test_cached_features_are_those_computed_each_time(raw, task, tmp_path):
    computed = run(raw(task))
    cached = run(raw(task, folder=str(tmp_path / "cached"), data={"cache_features": str(tmp_path / "features")}))
    assert losses(tmp_path / "cached") == pytest.approx(losses(raw()["folder"]), rel=1e-4)
    assert cached == computed


def test_an_encoder_that_is_trained_learns_less_in_its_first_layers(raw, pretrained):
    run(raw(train_encoder=True, optimization={"layer_decay": 0.5}))
    before, after = last_weights(pretrained)["encoder"], last_weights(raw()["folder"])["encoder"]

    def change(name):
        return float((after[name] - before[name]).abs().mean())

    assert 0 < change("patch_embed.proj.weight") < change("blocks.0.mlp.fc1.weight") < change("blocks.1.mlp.fc1.weight")
    encoder = hub.load_encoder(raw()["folder"])
    assert all(torch.equal(x, after[name]) for name, x in encoder.state_dict().items())


def test_a_frozen_encoder_is_neither_changed_nor_stored(raw):
    run(raw())
    assert last_weights(raw()["folder"]).keys() == {"bridge", "language_model"}


def test_an_encoder_from_scratch(raw):
    sections = {"pretrain": None, "encoder": ENCODER, "train_encoder": True}
    found = run(raw(**sections, data={"patch_size": 8}))
    assert found["num_val"] == 6
    assert last_weights(raw()["folder"])["encoder"]["patch_embed.proj.weight"].shape[-1] == 8


@pytest.mark.parametrize("task", MOSTLY_FAST)
def test_a_blind_run_does_not_depend_on_the_videos(raw, task, scenes, tmp_path):
    """Neither on those of training nor on those of validation."""
    shutil.copytree(scenes / "videos", tmp_path / "videos")
    files = sorted((tmp_path / "videos").glob("t*.mp4"))
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    found = {}
    for blind in (False, True):
        changes = {"blind": blind, "train_encoder": True, "evaluation": {"swap_videos": True}}
        right = run(raw(task, folder=str(tmp_path / f"right-{blind}"), **changes))
        other = run(
            raw(task, folder=str(tmp_path / f"other-{blind}"), data={"videos": str(tmp_path / "videos")}, **changes)
        )
        found[blind] = losses(tmp_path / f"right-{blind}"), losses(tmp_path / f"other-{blind}")
        if blind:
            assert right == other
            swapped = right.pop("swapped_videos")
            assert swapped == {name: right[name] for name in swapped}
    assert found[True][0] == found[True][1]
    assert found[False][0] != found[False][1]


@pytest.fixture(scope="module")
def dark_and_bright(tmp_path_factory):
    """Dark and bright videos in turn, with a caption and a question for each."""
    folder = tmp_path_factory.mktemp("dark and bright")
    rng = np.random.default_rng(0)
    names = ["dark", "bright"] * 6
    (folder / "videos").mkdir()
    for i, name in enumerate(names):
        frames = rng.integers(0, 90, (8, 32, 32, 3), dtype=np.uint8) + np.uint8(120 * (name == "bright"))
        encode(frames, folder / "videos" / f"{i}.mp4", 4)
    captions = [{"video": str(i), "caption": f"{name} video"} for i, name in enumerate(names)]
    questions = [{"video_id": i, "question": "how is it ?", "answer": name} for i, name in enumerate(names)]
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "questions.json").write_text(json.dumps(questions))
    return folder


@pytest.mark.parametrize(
    ("task", "kind", "metric"),
    [
        ("captioning", "generated", "exact_match"),
        ("question_answering", "generated", "accuracy"),
        ("question_answering", "classified", "accuracy"),
    ],
)
def test_what_is_seen_is_told_and_with_swapped_videos_it_is_the_other(raw, dark_and_bright, task, kind, metric):
    listed = str(dark_and_bright / f"{LISTS[task]}.json")
    data = {"dataset_train": listed, "dataset_val": listed, "videos": str(dark_and_bright / "videos")}
    data["cache_features"] = True
    optimization = {"num_epochs": 30, "lr": 1e-2, "batch_size": 6}
    answers = {"kind": kind} if task == "question_answering" else {}
    found = run(raw(task, data=data, optimization=optimization, answers=answers, evaluation={"swap_videos": True}))
    assert (found[metric], found["swapped_videos"][metric]) == (100, 0)
