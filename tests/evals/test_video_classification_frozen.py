import copy
import csv
import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from evals.video_classification_frozen import eval as program
from tubelet import hub
from tubelet.config import ConfigError, check
from tubelet.data import VideoError, video_dataset
from tubelet.data import worker_monitor as culprits
from tubelet.models import ModelConfig, build_encoder
from tubelet.probing import fit
from tubelet.probing.clips import LabelledClips
from tubelet.probing.encoder import FrozenEncoder, with_normalization
from tubelet.probing.results import validate
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.runtime.run_folder import read_log


def options(raw, **sections):
    raw = copy.deepcopy(raw)
    for name, change in sections.items():
        raw[name] = {**raw[name], **change} if isinstance(change, dict) and name in raw else change
    return check(raw, program.Options, "test.yaml")


def run(raw, **sections):
    chosen = options(raw, **sections)
    program.main(chosen, World())
    return json.loads((Path(chosen.folder) / "results.json").read_text())


def frozen(chosen):
    return FrozenEncoder(with_normalization(chosen), torch.device("cpu"))


def predictions(folder):
    with open(Path(folder) / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_results_and_predictions_say_the_same(raw, labelled):
    results = run(raw, data={"num_views_per_segment": 2})
    rows = predictions(raw["folder"])
    assert [row["path"] for row in rows] == [str(labelled / f"val{i}.mp4") for i in range(12)]
    assert [int(row["label"]) for row in rows] == [i % 3 for i in range(12)]
    right = sum(row["label"] == row["predicted"] for row in rows)
    assert results["top1"] == pytest.approx(100 * right / 12, abs=1e-3)
    assert results["top1"] == max(head["val_top1"] for head in results["heads"])
    best = results["heads"][results["best_head"]["index"]]
    assert (best["lr"], best["weight_decay"]) == (results["best_head"]["lr"], results["best_head"]["weight_decay"])
    assert best["val_top1"] == results["top1"]
    assert best["train_loss"] == results["train_loss"] > 0
    assert results["top5"] is None
    assert (results["num_train"], results["num_val"], results["excluded"]) == (18, 12, [])
    assert (Path(raw["folder"]) / "confusion.png").stat().st_size > 1000


def test_the_probe_in_the_folder_is_the_one_that_predicted(raw):
    run(raw)
    chosen = options(raw)
    encoder = frozen(chosen)
    probe = hub.load_probe(raw["folder"])
    val = LabelledClips(chosen.data, "dataset_val", resolution=32)
    for batch, row in zip(val.batches(torch.arange(12).split(1)), predictions(raw["folder"]), strict=True):
        tokens = encoder(batch.clips[None]).flatten(1, 2)
        probability, predicted = probe(tokens).detach().softmax(-1).max(-1)
        assert int(row["predicted"]) == int(predicted)
        assert float(row["probability"]) == pytest.approx(float(probability), abs=1e-3)


@pytest.mark.parametrize("head", ["attentive", "linear"])
def test_cached_features_change_nothing(raw, head, tmp_path):
    live = run(raw, head=head, data={"num_workers": 2})
    cached = run(raw, head=head, folder=str(tmp_path / "cached"), data={"cache_features": str(tmp_path / "features")})
    for ours, theirs in zip(live["heads"], cached["heads"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert [row["predicted"] for row in predictions(raw["folder"])] == [
        row["predicted"] for row in predictions(tmp_path / "cached")
    ]


def test_tasks_on_the_same_videos_encode_them_once(raw, monkeypatch):
    encoded = []
    encode = FrozenEncoder.__call__
    monkeypatch.setattr(FrozenEncoder, "__call__", lambda self, x: encoded.append(len(x)) or encode(self, x))
    tasks = {"all": {}, "few": {"data": {"labels_per_class": 3}}, "linear": {"head": "linear"}}
    results = run(raw, data={"cache_features": True}, tasks=tasks, meta={"seed": [0, 1]})
    assert sum(encoded) == 18 + 12
    assert results["tasks"]["few"]["seeds"]["1"]["num_train"] == 9
    both = [results["tasks"]["all"]["seeds"][seed]["top1"] for seed in "01"]
    assert results["tasks"]["all"]["top1"] == pytest.approx(sum(both) / 2)
    assert (Path(raw["folder"]) / "linear" / "seed-0" / "probe.pt").is_file()


def test_a_cache_has_no_features_of_other_colours(raw, monkeypatch, tmp_path):
    encoded = []
    encode = FrozenEncoder.__call__
    monkeypatch.setattr(FrozenEncoder, "__call__", lambda self, x: encoded.append(len(x)) or encode(self, x))
    for number, colours in enumerate(({}, {"normalize_mean": [0.5, 0.5, 0.5]}, {"normalize_std": [0.1, 0.1, 0.1]}, {})):
        data = {**colours, "cache_features": str(tmp_path / "features")}
        run(raw, folder=str(tmp_path / str(number)), data=data)
        assert sum(encoded) == min(number + 1, 3) * (18 + 12)


def test_holdout_looks_at_validation_with_the_chosen_head_only(raw):
    results = run(raw, optimization={"select": "holdout", "holdout_folds": 2})
    validated = [head for head in results["heads"] if "val_top1" in head]
    assert validated == [results["heads"][results["best_head"]["index"]]]
    assert validated[0]["holdout_top1"] == max(head["holdout_top1"] for head in results["heads"])
    assert results["num_train"] == 18


class Stopped(Exception):
    pass


@pytest.mark.parametrize("augmented", [False, True])
def test_going_on_after_a_stop_is_as_never_stopping(raw, augmented, tmp_path, monkeypatch):
    sections = {"meta": {"save_every_minutes": 0.0}, "data_aug": {"horizontal_flip": False} if augmented else None}
    straight = run(raw, folder=str(tmp_path / "straight"), **sections)
    save = fit.Fitter._save

    def stop_after_five_steps(self, stage, now, *rest):
        save(self, stage, now, *rest)
        if now.step == 5:  # in the middle of the second epoch
            raise Stopped

    monkeypatch.setattr(fit.Fitter, "_save", stop_after_five_steps)
    with pytest.raises(Stopped):
        run(raw, **sections)
    monkeypatch.setattr(fit.Fitter, "_save", save)
    resumed = run(raw, **sections)

    assert resumed["heads"] == straight["heads"]
    ours, theirs = (torch.load(Path(f) / "probe.pt")["classifier"] for f in (raw["folder"], tmp_path / "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in read_log(Path(raw["folder"]))] == [1, 2, 3]


def test_the_log_says_how_many_epochs_there_are(raw):
    run(raw, optimization={"min_steps": 14})  # of three steps an epoch
    assert [(line["step"], line["last_step"]) for line in read_log(Path(raw["folder"]))] == [
        (epoch, 5) for epoch in range(1, 6)
    ]


def test_a_finished_folder_is_read_and_another_probe_refused_there(raw, monkeypatch):
    first = run(raw)
    monkeypatch.setattr(fit.Fitter, "fit", None)
    assert run(raw) == first
    with pytest.raises(ConfigError, match="optimization.num_epochs: 3 there, 4 here"):
        run(raw, optimization={"num_epochs": 4})
    with pytest.raises(checkpoint.CheckpointError, match="take 8 samples, optimization.batch_size .* is 4 here"):
        run(raw, optimization={"batch_size": 4})
    with pytest.raises(ConfigError, match="pretrain.init_seed"):
        run(raw, pretrain={"init_seed": 1})


def test_other_labels_under_the_same_name_are_refused(raw, labelled, tmp_path):
    lines = (labelled / "train.csv").read_text().splitlines()
    own = tmp_path / "train.csv"
    own.write_text("\n".join(lines))
    run(raw, data={"dataset_train": str(own)})
    own.write_text("\n".join([lines[0][:-1] + "2", *lines[1:]]))
    with pytest.raises(ConfigError, match="other weights or labels"):
        run(raw, data={"dataset_train": str(own)})


@pytest.mark.parametrize("cached", [False, True])
def test_an_unreadable_video_stops_the_probe_or_is_excluded_and_listed(raw, labelled, cached, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text((labelled / f"{name}.csv").read_text() + f"{broken.name} 0\n")
    data = {"dataset_train": str(tmp_path / "train.csv"), "dataset_val": str(tmp_path / "val.csv")}
    data["cache_features"] = cached
    with pytest.warns(UserWarning, match="1 videos are in"), pytest.raises(VideoError, match="broken.mp4"):
        run(raw, data=data)
    with pytest.warns(UserWarning, match="2 unreadable|1 videos are in"):
        results = run(raw, folder=str(tmp_path / "second"), data={**data, "on_bad_video": "exclude"})
    assert [(bad["split"], bad["path"]) for bad in results["excluded"]] == [
        ("train", str(broken)),
        ("val", str(broken)),
    ]
    assert all(bad["reason"] for bad in results["excluded"])
    assert (results["num_train"], results["num_val"], len(predictions(tmp_path / "second"))) == (18, 12, 12)


def test_no_readable_validation_video_is_said_before_training(raw, monkeypatch, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.mp4").write_bytes(b"no video")
    (tmp_path / "val.csv").write_text("0.mp4 0\n1.mp4 1\n")
    monkeypatch.setattr(fit.Fitter, "fit", None)
    with pytest.raises(ConfigError, match="data.dataset_val: .*val.csv: not one of the 2 videos can be read"):
        run(raw, data={"dataset_val": str(tmp_path / "val.csv"), "on_bad_video": "exclude"})
    with pytest.raises(ConfigError, match="data.dataset_val: not one"):
        validate(iter([]), 3, World(), "data.dataset_val")


def test_a_random_encoder_is_a_function_of_seed_and_scale(raw):
    def weights(**pretrain):
        encoder = frozen(options(raw, pretrain=pretrain))
        return encoder.fingerprint, encoder.module.blocks[0].attn.qkv.weight.std()

    fingerprint, std = weights()
    assert weights()[0] == fingerprint
    assert weights(init_seed=1)[0] != fingerprint
    assert float(weights(init_std=0.06)[1] / std) == pytest.approx(3, rel=0.05)


@pytest.fixture
def run_folder(tmp_path):
    """What pretraining leaves behind; the target encoder's weights are twice the encoder's."""
    model = {"model_name": "vit_tiny", "encoder_args": {"embed_dim": 24, "depth": 1, "num_heads": 2}}
    data = {"crop_size": 32, "num_frames": 4, "patch_size": 8, "tubelet_size": 2}
    encoder = build_encoder(ModelConfig(**model), **data).state_dict()
    target = {name: 2 * weight for name, weight in encoder.items()}
    state = {"step": 1, "encoder": encoder, "target_encoder": target, "config": {"model": model, "data": data}}
    checkpoint.save(tmp_path / "pretraining" / "checkpoints", 1, state, keep=1)
    (tmp_path / "pretraining" / "config.yaml").write_text(yaml.safe_dump(state["config"]))
    return tmp_path / "pretraining", encoder


def test_a_run_folder_gives_its_target_encoder_or_random_weights_of_its_architecture(raw, run_folder):
    folder, weights = run_folder
    for key, factor in (("target_encoder", 2), ("encoder", 1)):
        chosen = options({**raw, "pretrain": {"folder": str(folder), "checkpoint_key": key}})
        loaded = frozen(chosen).module
        assert torch.equal(loaded.blocks[0].attn.qkv.weight, factor * weights["blocks.0.attn.qkv.weight"])
        assert not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
    random = {"folder": str(folder), "checkpoint": "random"}
    drawn, same = (frozen(options({**raw, "pretrain": pretrain})) for pretrain in (random, raw["pretrain"]))
    assert drawn.fingerprint == same.fingerprint
    deeper = frozen(options({**raw, "pretrain": {**random, "encoder_args": {"depth": 2}}})).module
    assert (deeper.embed_dim, len(deeper.blocks)) == (24, 2)
    assert run({**raw, "pretrain": {"folder": str(folder)}})["num_val"] == 12


def test_clips_are_normalised_as_in_the_pretraining(raw, run_folder, tmp_path):
    folder, _ = run_folder
    grey = {"normalize_mean": (0.1, 0.2, 0.3), "normalize_std": (0.4, 0.5, 0.6)}
    for pretrain in ({"folder": str(folder)}, {"folder": str(folder), "checkpoint": "random"}):
        assert frozen(options({**raw, "pretrain": pretrain})).mean == (0.485, 0.456, 0.406)  # it does not say
    state = checkpoint.load_latest(folder / "checkpoints")
    state["config"]["data_aug"] = {"auto_augment": False, **grey}
    checkpoint.save(folder / "checkpoints", 2, state, keep=1)
    for pretrain in ({"folder": str(folder)}, {"folder": str(folder), "checkpoint": "random"}):
        encoder = frozen(options({**raw, "pretrain": pretrain}))
        assert (encoder.mean, encoder.std) == (grey["normalize_mean"], grey["normalize_std"])
    assert frozen(options(raw)).mean == (0.485, 0.456, 0.406)
    own = frozen(options({**raw, "pretrain": {"folder": str(folder)}}, data={"normalize_mean": [0.5, 0.5, 0.5]}))
    assert (own.mean, own.std) == ((0.5, 0.5, 0.5), grey["normalize_std"])
    tasks = {"augmented": {"data_aug": {"reprob": 0.5}}}
    run({**raw, "pretrain": {"folder": str(folder)}}, tasks=tasks)
    said = yaml.safe_load((Path(raw["folder"]) / "augmented" / "config.yaml").read_text())
    for section in ("data", "data_aug"):
        assert {name: tuple(said[section][name]) for name in grey} == grey


def test_bfloat16_probes_about_the_same(raw, tmp_path):
    full = run(raw, optimization={"min_steps": 60})
    half = run(raw, folder=str(tmp_path / "half"), optimization={"min_steps": 60, "use_bfloat16": True})
    assert half["encoder"] == full["encoder"]
    for ours, theirs in zip(half["heads"], full["heads"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=0.15)


def test_a_bright_task_is_learned(raw):
    """Which third of the frame is bright needs no motion: a random encoder's features tell, and the loss gets low."""
    results = run(raw, optimization={"min_steps": 200, "heads": None, "lr": 3e-3}, data={"cache_features": True})
    assert results["train_loss"] < 0.05
    assert results["train_top1"] == 100


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"data": {"dataset_train": "nowhere.csv"}}, "nowhere.csv.*no such"),
        ({"data": {"num_classes": 2}}, "train2.mp4 has label 2; with num_classes 2"),
        ({"data": {"labels_per_class": 7}}, "labels_per_class: 7 asked for, but class 0 has only 6"),
        ({"data": {"frames_per_clip": 3}}, "frames_per_clip 3.*tubelet"),
        ({"data": {"cache_features": True}, "data_aug": {}}, "cache_features keeps one version"),
        ({"optimization": {"resolution": 36}}, "resolution 36.*patch"),
        ({"optimization": {"learning_rate": 1.0}}, "optimization.learning_rate: unknown key"),
        ({"optimization": {"holdout_folds": 6}}, "only 5 disjoint parts"),
        ({"optimization": {"warmup": 4.0}}, "warmup: 4.0 epochs of warm-up do not fit into 3 epochs"),
        ({"data": {"fps": 4.0}}, "frame_step and fps given; keep one of"),
        ({"distributed": "fsdp"}, "a probe's encoder is not sharded"),
        ({"pretrain": {"checkpoint": None, "folder": "nowhere"}}, "pretrain.folder: nowhere does not exist"),
        ({"pretrain": {"checkpoint": None}}, "folder: give the run folder"),
        ({"pretrain": {"model_name": "vit_tinny"}}, "vit_tinny.*vit_tiny"),
        ({"pretrain": {"model_name": None}}, "model_name: a random encoder needs an architecture"),
        ({"tasks": {"few": {"data": {"labels": 3}}}}, r"tasks.few.data.labels"),
        ({"tasks": {"other": {"pretrain": {"init_seed": 3}}}}, "all tasks probe one encoder"),
        ({"tasks": {"other": {"data": {"normalize_std": [1.0, 1.0, 1.0]}}}}, "other.data.normalize_std: all tasks"),
        ({"tasks": {"other": {"optimization": {"use_bfloat16": True}}}}, "other.optimization.use_bfloat16: all tasks"),
        ({"tasks": {"a": {}, "b": {"optimization": {"resolution": 36}}}}, "tasks.b: .*resolution 36.*patch"),
        ({"data_aug": {"normalize_mean": [0.0, 0.0, 0.0]}}, "data_aug.normalize_mean: clips are normalised by data.n"),
        ({"pretrain": {"encoder_args": {"num_classes": 3}}}, "pretrain: encoder_args.num_classes: .*remove it"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_computed(raw, sections, said):
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        run(raw, **sections)
    assert not Path(raw["folder"]).exists()


def test_a_video_that_crashes_its_decoder_is_excluded_and_named(raw, labelled, monkeypatch):
    """As decoders written in C do it: the worker is gone, without an exception."""
    crashing = str(labelled / "val3.mp4")
    open_video = video_dataset.open_video

    def crash(path, decoder):
        if path == crashing:
            os.kill(os.getpid(), signal.SIGSEGV)
        return open_video(path, decoder)

    monkeypatch.setattr(video_dataset, "open_video", crash)
    monkeypatch.setattr(culprits, "MAX_READ_SECONDS", 0.5)
    with pytest.warns(UserWarning, match="1 unreadable"):
        results = run(
            raw, data={"num_workers": 1, "worker_timeout": 3, "on_bad_video": "exclude", "cache_features": True}
        )
    assert [(bad["split"], bad["path"]) for bad in results["excluded"]] == [("val", crashing)]
    assert "worker crashed" in results["excluded"][0]["reason"]
    assert [row["path"] for row in predictions(raw["folder"])] == [
        str(labelled / f"val{i}.mp4") for i in range(12) if i != 3
    ]
