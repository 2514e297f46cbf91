"""Classification, synchronisation and retrieval of videos with sound: what is learned, resuming, several processes."""

import copy
import json
from pathlib import Path

import matplotlib.figure  # noqa: F401 - imported once for all processes, which are forked
import numpy as np
import pytest
import torch

from app.audio import train as program
from app.audio.model import build_model
from tests.app.conftest import FPS, RATE, classification
from tests.processes import run as run_on_processes
from tests.stops import stopped_at
from tubelet import hub
from tubelet.config import ConfigError, check
from tubelet.data.loader import make_eval_loader
from tubelet.objectives.audio_visual import Synchronisation
from tubelet.probing.encoder import with_normalization
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.runtime.watchdog import Watchdog


@pytest.fixture
def raw(sounding, tmp_path):
    return classification(sounding, tmp_path / "run") | {
        "spectrogram": {"window": 0.0625, "hop": 0.03125, "num_bands": 16, "patch_size": 4},
        "encoder": {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2, "drop_rate": 0.1},
        "sound_encoder": {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2},
        "optimization": {"resolution": 32, "batch_size": 4, "num_epochs": 3, "lr": 3e-3, "warmup": 1},
        "logging": {"log_every": 1, "checkpoint_every_steps": 1},
    }


def changed(raw, **sections):
    raw = copy.deepcopy(raw)
    for name, change in sections.items():
        raw[name] = {**raw.get(name, {}), **change} if isinstance(change, dict) else change
    return raw


def run(raw, **sections):
    raw = changed(raw, **sections)
    program.main(check(raw, program.Options, "test.yaml"), World())
    return json.loads((Path(raw["folder"]) / "results.json").read_text())


def synchronisation(raw):
    return changed(
        raw,
        task="synchronisation",
        data={"num_classes": None},
        sound={"missing": "exclude"},
        synchronisation={"resolution": 0.25, "steps": 1},
    )


def retrieval(raw):
    return changed(raw, task="retrieval", data={"num_classes": None}, sound={"missing": "exclude"})


TASKS = {
    "classification": (lambda raw: raw, {"encoder", "sound_encoder", "fusion"}),
    "synchronisation": (synchronisation, {"encoder", "sound_encoder", "fusion"}),
    "retrieval": (retrieval, {"encoder", "sound_encoder", "video_head", "sound_head", "contrastive"}),
}


def learn(raw, modalities):
    """Train long enough to learn the label; return the results and the accuracy on the videos with sound."""
    results = run(
        raw,
        modalities=modalities,
        encoder={"init_std": 0.1},
        sound_encoder={"init_std": 0.1},
        optimization={"num_epochs": 40, "batch_size": 8},
        logging={"checkpoint_every_steps": 100},
    )
    rows = [line.split(",") for line in (Path(raw["folder"]) / "predictions.csv").read_text().splitlines()[1:9]]
    return results, 100 * np.mean([row[1] == row[2] for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["video", "sound"])
def test_a_label_that_needs_both_is_not_learned_from_one(raw, modality):
    """Exclusive or: neither modality alone tells anything."""
    assert learn(raw, [modality])[1] <= 75


def test_a_label_that_needs_both_is_learned_from_both(raw):
    results, top1 = learn(raw, ["video", "sound"])
    assert top1 == 100
    assert list(results["silent"]) == [str(Path(raw["data"]["dataset_val"]).parent / "val8.mp4")]
    assert (results["num_val"], results["excluded"], results["bad_train"]) == (9, {}, {})
    assert hub.load_encoder(raw["folder"], "encoder").embed_dim == 24


@pytest.mark.parametrize("task", TASKS)
def test_going_on_after_a_stop_is_as_never_stopping(raw, task, tmp_path):
    raw = TASKS[task][0](raw)
    straight = run(raw, folder=str(tmp_path / "straight"))
    with stopped_at(6):
        run(raw)
    assert run(raw) == straight
    ours, theirs = (last_weights(folder) for folder in (raw["folder"], tmp_path / "straight"))
    assert ours.keys() == theirs.keys() == TASKS[task][1]
    for part, weights in theirs.items():
        assert all(torch.equal(ours[part][name], value) for name, value in weights.items())


def last_weights(folder):
    return checkpoint.read(checkpoint.newest(Path(folder) / "checkpoints")).weights


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_do_what_one_does(raw, task, tmp_path):
    raw = TASKS[task][0](raw)
    raw["encoder"]["drop_rate"] = 0.0  # dropout differs between processes
    alone = run(raw, folder=str(tmp_path / "alone"))
    raw["optimization"]["batch_size"] //= 2
    run_on_processes(program.main, check(raw, program.Options, "test.yaml"), 2)
    together = json.loads((Path(raw["folder"]) / "results.json").read_text())
    if task != "retrieval":
        assert together.pop("loss") == pytest.approx(alone.pop("loss"), rel=1e-3)
    assert together == alone
    assert losses(raw["folder"]) == pytest.approx(losses(tmp_path / "alone"), rel=1e-3)


def losses(folder):
    return [json.loads(line)["loss"] for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def test_retrieval_finds_the_sound_of_a_video_and_not_that_of_another(raw, sounding, tmp_path):
    """Of files with label 0, the bright ones have the high tone: two pairs of equal files, and one without sound."""
    for name in ("train", "val"):
        lines = [line for line in (sounding / f"{name}.csv").read_text().splitlines() if line.endswith(" 0")]
        (tmp_path / f"{name}.csv").write_text("".join(f"{sounding}/{line}\n" for line in lines))
    results = run(
        retrieval(raw),
        data={
            "num_classes": None,
            "dataset_train": str(tmp_path / "train.csv"),
            "dataset_val": str(tmp_path / "val.csv"),
        },
        encoder={"init_std": 0.1},
        sound_encoder={"init_std": 0.1},
        optimization={"num_epochs": 40, "batch_size": 8},
        logging={"checkpoint_every_steps": 100},
    )
    assert results["num_val"] == 4
    assert list(results["excluded"].values()) == ["no sound track"]
    for direction in ("sound_to_video", "video_to_sound"):
        assert results[f"{direction}_median_rank"] < 2.5 < results["swapped_videos"][f"{direction}_median_rank"]


def test_synchronisation_reports_each_shift_and_leaves_out_what_has_no_sound(raw):
    results = run(synchronisation(raw))
    assert list(results["top1_by_shift"]) == ["-0.25", "+0", "+0.25"]
    assert results["top1"] == pytest.approx(np.mean(list(results["top1_by_shift"].values())), abs=0.01)
    ((path, reason),) = results["excluded"].items()
    assert (Path(path).name, reason, results["num_val"]) == ("val8.mp4", "no sound track", 8)
    rows = (Path(raw["folder"]) / "predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["0", "1", "2"] * 8


@pytest.mark.parametrize("task", ["classification", "retrieval"])
def test_the_evaluation_is_watched(raw, task, monkeypatch):
    notes = []
    monkeypatch.setattr(Watchdog, "note", lambda self, activity: notes.append(activity))
    run(TASKS[task][0](raw), optimization={"num_epochs": 1})
    assert notes[-1].endswith("of the evaluation")


def test_the_shifted_sound_is_that_of_later_seconds(raw):
    options = check(synchronisation(raw), program.Options, "test.yaml")
    model = build_model(with_normalization(options))
    assert isinstance(model, Synchronisation)
    (batch,) = make_eval_loader(program.validation_videos(options), batch_size=16, indices=range(6))
    clip = int(0.5 * RATE)
    for number, shift in enumerate((-0.25, 0.0, 0.25)):
        shifted = model.shifted(batch, [number] * 6)
        start = round((0.25 + shift) * RATE)
        assert torch.equal(shifted.views["sound"], batch.views["sound"][..., start : start + clip])
        assert shifted.labels.tolist() == [number] * 6
    seen, heard = batch.clips.float().mean((1, 3, 4)) > 200, model.shifted(batch, [1] * 6).views["sound"]
    for flash, sound in zip(seen, heard, strict=True):
        loud = sound.abs().amax(0) > 0.5
        assert loud.any() == flash.any()
        if flash.any():
            assert torch.nonzero(loud)[0] / RATE == pytest.approx(int(torch.nonzero(flash)[0]) / FPS, abs=0.01)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"fps": None, "frame_step": 1}}, "clips with sound need the same duration in all files"),
        ({"data": {"num_classes": None}}, "classification needs the number of classes"),
        (
            {"spectrogram": {"hop": 0.03}},
            "0.03 seconds are 240 samples, .* has 4.16667; .* With 4 tokens, hop is 0.03125",
        ),
        ({"task": "synchronisation"}, "sound.missing: silence has no shift"),
        ({"task": "retrieval"}, "sound.missing: .* set it to exclude for retrieval"),
        (
            {"task": "retrieval", "sound": {"missing": "exclude"}, "modalities": ["sound"]},
            r"retrieval needs \[video, sound\]",
        ),
        ({"train_encoder": False}, "encoders from scratch have to be trained"),
        ({"modalities": ["sound", "video"]}, r"expected \[video\], \[sound\] or \[video, sound\]"),
        ({"data": {"num_classes": 3, "dataset_val": "nowhere.csv"}}, "nowhere.csv"),
        ({"encoder": None}, "give either `pretrain`, a pretrained encoder, or `encoder`"),
    ],
)
def test_what_does_not_fit_together_is_refused(raw, sections, message):
    with pytest.raises(ConfigError, match=message):
        run(raw, **sections)


def test_a_frozen_pretrained_encoder_is_not_trained(raw, tmp_path):
    run(raw, folder=str(tmp_path / "first"), modalities=["video"])
    pretrain = {"folder": str(tmp_path / "first"), "checkpoint_key": "encoder"}
    run(raw, encoder=None, pretrain=pretrain, train_encoder=False)
    assert last_weights(raw["folder"]).keys() == {"sound_encoder", "fusion"}
