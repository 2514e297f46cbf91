import copy
import csv
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml

from evals.video_classification_frozen import eval as program
from tubelet import hub, report
from tubelet.config import ConfigError, UserError, check, load
from tubelet.data import VideoError, video_dataset, worker_monitor
from tubelet.grid import ClipShape
from tubelet.models import build_encoder
from tubelet.probing import fit
from tubelet.probing.clips import LabelledClips
from tubelet.probing.encoder import FrozenEncoder, with_normalization
from tubelet.probing.results import validate
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.runtime.run_folder import read_log
from tubelet.runtime.seeds import Purpose, numpy_generator


class Stopped(Exception):
    pass


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
    filled_in = with_normalization(chosen)
    o = filled_in.optimization
    return FrozenEncoder(filled_in.pretrain, filled_in.data, o.resolution, torch.device("cpu"), bfloat16=o.use_bfloat16)


def predictions(folder):
    with open(Path(folder) / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_results_and_predictions_agree(raw, labelled, with_figure):
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


def test_the_head_in_the_folder_is_the_one_that_predicted(raw):
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


@pytest.mark.parametrize("head", ["attentive", "linear", "linear_slots", "knn"])
def test_cached_features_change_nothing(raw, head, tmp_path):
    live = run(raw, head=head, data={"num_workers": 2})
    cached = run(raw, head=head, folder=str(tmp_path / "cached"), data={"cache_features": str(tmp_path / "features")})
    for ours, theirs in zip(live["heads"], cached["heads"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert [row["predicted"] for row in predictions(raw["folder"])] == [
        row["predicted"] for row in predictions(tmp_path / "cached")
    ]


@pytest.mark.parametrize("head", ["attentive", "linear_slots"])
def test_features_read_from_disk_for_each_batch_give_the_same_results(raw, head, tmp_path, caplog):
    in_memory = run(raw, head=head, folder=str(tmp_path / "1"), data={"cache_features": True})
    assert "do not fit" not in caplog.text
    streamed = run(raw, head=head, folder=str(tmp_path / "2"), data={"cache_features": True, "feature_memory": 0.0})
    assert ("do not fit" in caplog.text) == (head == "attentive")  # means are small
    assert streamed["heads"] == in_memory["heads"]
    ours, theirs = (hub.load_probe(tmp_path / name).state_dict() for name in "12")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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
    assert (Path(raw["folder"]) / "linear" / "seed-0" / "probe.safetensors").is_file()
    written = load(Path(raw["folder"]) / "config.yaml", [], program.Options)  # as that of a single probe
    assert list(written.tasks) == list(tasks)
    assert written.data.normalize_mean is not None
    assert load(Path(raw["folder"]) / "few/config.yaml", [], program.Options).seeds == [0, 1]
    compared = report.compare(
        [raw["folder"], Path(raw["folder"]) / "few"], Path(raw["folder"]) / "compared"
    ).read_text()
    assert "tasks.few.seeds.0.top1" in compared
    more = {**tasks, "fewer": {"data": {"labels_per_class": 2}}}
    again = run(raw, data={"cache_features": True}, tasks=more, meta={"seed": [0, 1]})  # tasks may be added
    assert again["tasks"]["all"] == results["tasks"]["all"]
    assert list(load(Path(raw["folder"]) / "config.yaml", [], program.Options).tasks) == list(more)


def test_features_of_another_normalization_are_not_reused(raw, monkeypatch, tmp_path):
    encoded = []
    encode = FrozenEncoder.__call__
    monkeypatch.setattr(FrozenEncoder, "__call__", lambda self, x: encoded.append(len(x)) or encode(self, x))
    for number, colours in enumerate(({}, {"normalize_mean": [0.5, 0.5, 0.5]}, {"normalize_std": [0.1, 0.1, 0.1]}, {})):
        data = {**colours, "cache_features": str(tmp_path / "features")}
        run(raw, folder=str(tmp_path / str(number)), data=data)
        assert sum(encoded) == min(number + 1, 3) * (18 + 12)


def test_the_number_of_neighbors_is_selected_on_held_out_videos(raw):
    head = {"name": "knn", "k": [1, 3, 15], "temperature": 0.1}
    results = run(raw, head=head, optimization={"select": "holdout", "holdout_folds": 5}, data={"cache_features": True})
    assert [row["k"] for row in results["heads"]] == [1, 3, 15]
    best = results["best_head"]
    assert best["k"] == results["heads"][best["index"]]["k"]
    assert results["heads"][best["index"]]["holdout_top1"] == max(row["holdout_top1"] for row in results["heads"])
    assert [row for row in results["heads"] if "val_top1" in row] == [results["heads"][best["index"]]]
    assert "train_loss" not in results

    chosen = options(raw)
    encoder = frozen(chosen)
    bank, queries = (
        torch.cat([encoder(b.clips[None]).mean((1, 2)) for b in clips.batches(torch.arange(len(clips)).split(1))])
        for clips in (LabelledClips(chosen.data, f"dataset_{part}", resolution=32) for part in ("train", "val"))
    )
    mean, labels = bank.mean(0), [i % 3 for i in range(18)]
    for query, row in zip(queries, predictions(raw["folder"]), strict=True):
        similarity = torch.cosine_similarity(query - mean, bank - mean)
        votes = torch.zeros(3)
        for neighbor in similarity.argsort(descending=True)[: best["k"]].tolist():
            votes[labels[neighbor]] += (similarity[neighbor] / 0.1).exp()
        assert int(row["predicted"]) == int(votes.argmax())
        assert float(row["probability"]) == pytest.approx(float(votes.max() / votes.sum()), abs=1e-3)


def test_linear_slots_is_standardized_with_the_training_set(raw):
    run(raw, head="linear_slots", data={"num_views_per_segment": 2})
    chosen = options(raw)
    encoder, head = frozen(chosen), hub.load_probe(raw["folder"])
    train = LabelledClips(chosen.data, "dataset_train", resolution=32)
    slots = []  # of 2 segments with 2 time slots of 16 tokens each
    for batch in train.batches(torch.arange(18).split(1)):
        slots.append(
            torch.cat([clip[16 * t : 16 * t + 16].mean(0) for clip in encoder(batch.clips[None])[0] for t in (0, 1)])
        )
    torch.testing.assert_close(head.mean, torch.stack(slots).mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.std, torch.stack(slots).std(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_the_head_is_validated_on_shuffled_frames_too(raw, cached, monkeypatch, tmp_path):
    """The order of the frames is all that tells the three classes apart."""
    learned = {"optimization": {"min_steps": 200, "heads": None, "lr": 3e-3}}
    sections = {"data": {"cache_features": cached}, **learned}
    plain = run(raw, folder=str(tmp_path / "plain"), **sections)
    results = run(raw, evaluation={"shuffle_frames": True}, **sections)
    assert results["top1"] == plain["top1"]
    assert "shuffled_top1" not in plain

    chosen = options(raw)
    encoder, head = frozen(chosen), hub.load_probe(raw["folder"])
    val = LabelledClips(chosen.data, "dataset_val", resolution=32)
    right = 0
    for index, batch in enumerate(val.batches(torch.arange(12).split(1))):
        rng = numpy_generator(0, Purpose.CLIP, 0, index)
        clips = torch.stack([clip[:, torch.from_numpy(rng.permutation(4))] for clip in batch.clips])
        right += int(head(encoder(clips[None]).flatten(1, 2)).argmax()) == index % 3
    assert results["shuffled_top1"] == pytest.approx(100 * right / 12, abs=1e-3)


def test_shuffled_frames_are_encoded_once_for_all_heads_and_seeds(raw, monkeypatch):
    encoded = []
    encode = FrozenEncoder.__call__
    monkeypatch.setattr(FrozenEncoder, "__call__", lambda self, x: encoded.append(len(x)) or encode(self, x))
    tasks = {"linear": {"head": "linear"}, "slots": {"head": "linear_slots"}, "knn": {"head": "knn"}}
    sections = {"data": {"cache_features": True}, "evaluation": {"shuffle_frames": True}}
    results = run(raw, tasks=tasks, meta={"seed": [0, 1]}, **sections)
    assert sum(encoded) == 18 + 12 + 12
    for task in results["tasks"].values():
        each = [task["seeds"][seed]["shuffled_top1"] for seed in "01"]
        assert task["shuffled_top1"] == pytest.approx(sum(each) / 2)


def test_a_fraction_of_the_labels(raw):
    assert run(raw, head="linear", data={"label_fraction": 0.5})["num_train"] == 9


def test_an_encoder_whose_tokens_are_no_grid_is_refused_by_name(raw, tmp_path, monkeypatch):
    (tmp_path / "with_cls.py").write_text(
        "import functools, torch\n"
        "from tubelet.models.vision_transformer import VisionTransformer\n"
        "class WithCLS(VisionTransformer):\n"
        "    def forward(self, x, masks=None):\n"
        "        return torch.cat([x.new_zeros(len(x), 2, self.embed_dim), super().forward(x)], 1)\n"
        "tiny = functools.partial(WithCLS, embed_dim=24, depth=1, num_heads=2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    raw["pretrain"] = {"checkpoint": "random", "encoder": {"name": "with_cls.tiny"}, "patch_size": 8}
    with pytest.raises(ConfigError, match="WithCLS returns 34 tokens for a clip with a grid of 2 × 4 × 4"):
        run(raw, head="linear_slots")
    assert run(raw, folder=str(tmp_path / "linear"), head="linear")["num_val"] == 12


def test_holdout_evaluates_the_selected_head_only(raw):
    results = run(raw, optimization={"select": "holdout", "holdout_folds": 2})
    validated = [head for head in results["heads"] if "val_top1" in head]
    assert validated == [results["heads"][results["best_head"]["index"]]]
    assert validated[0]["holdout_top1"] == max(head["holdout_top1"] for head in results["heads"])
    assert results["num_train"] == 18


def test_a_head_that_diverges_is_never_the_best(raw):
    heads = {"lr": [1e30, 1e-2], "weight_decay": [0.01]}
    for select in ("val", "holdout"):
        folder = f"{raw['folder']}-{select}"
        results = run(raw, folder=folder, optimization={"heads": heads, "select": select})
        assert results["best_head"]["index"] == 1
        diverged, other = results["heads"]
        assert diverged.pop("diverged")
        assert "diverged" not in other
        assert {value for key, value in diverged.items() if key not in ("lr", "weight_decay")} == {None}
        assert math.isfinite(other["train_loss"])


@pytest.mark.parametrize("select", ["val", "holdout"])
def test_a_probe_of_which_all_heads_diverge_ends_with_an_error(raw, select):
    heads = {"lr": [1e30, 1e29], "weight_decay": [0.01]}
    with pytest.raises(UserError, match="no head has a finite loss.*Lower optimization.lr"):
        run(raw, optimization={"heads": heads, "select": select})
    assert not (Path(raw["folder"]) / "results.json").exists()


def test_checkpoints_with_a_head_that_has_diverged_are_strict_json_and_continue(raw, tmp_path, monkeypatch):
    sections = {
        "meta": {"save_every_minutes": 0.0},
        "optimization": {"heads": {"lr": [1e30, 1e-2], "weight_decay": [0.01]}},
    }
    straight = run(raw, folder=str(tmp_path / "straight"), **sections)
    save = checkpoint.save

    def stop_after_six_steps(folder, step, state, **options):
        save(folder, step, state, **options)
        written = json.dumps(state.metadata, allow_nan=False)
        if step == 6:
            assert "null" in written
            raise Stopped

    monkeypatch.setattr(checkpoint, "save", stop_after_six_steps)
    with pytest.raises(Stopped):
        run(raw, **sections)
    monkeypatch.setattr(checkpoint, "save", save)
    assert run(raw, **sections)["heads"] == straight["heads"]


def test_the_learning_rate_is_advanced_before_each_step(raw, monkeypatch):
    """As V-JEPA's: of n steps, step i has position i + 1 of the schedule, and the last one its end."""
    rates = []
    monkeypatch.setattr(fit, "_set_rates", lambda optimizers, grid, factor: rates.append(factor))
    chosen = options(raw, optimization={"warmup": 1.0, "start_lr": 1e-4, "heads": None})
    program.main(chosen, World())
    o = chosen.optimization
    assert rates == [o.learning_rate(i + 1, 3, 9) / o.lr for i in range(9)]
    assert (rates[2], rates[-1]) == (1, 0)


def test_names_that_are_not_utf8(raw, labelled, tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4")
    try:
        shutil.copy(labelled / "val0.mp4", name)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    for split in ("train", "val"):
        lines = (labelled / f"{split}.csv").read_text() + f'"{os.fsdecode(name)}" 0\n'
        (tmp_path / f"{split}.csv").write_text(lines, errors="surrogateescape")
    data = {"dataset_train": str(tmp_path / "train.csv"), "dataset_val": str(tmp_path / "val.csv")}
    results = run(raw, data={**data, "cache_features": True})
    assert (results["num_train"], results["num_val"]) == (19, 13)
    assert name in (Path(raw["folder"]) / "predictions.csv").read_bytes()


def rewritten(labelled, folder, of_label, split="train", skip=()):
    """A list of the same videos with other labels, and without those of the classes `skip`."""
    lines = [line.rsplit(" ", 1) for line in (labelled / f"{split}.csv").read_text().splitlines()]
    kept = [f"{path} {of_label(int(label))}\n" for path, label in lines if int(label) not in skip]
    (folder / f"{split}.csv").write_text("".join(kept))
    return str(folder / f"{split}.csv")


def test_names_of_classes_are_numbered_alike_in_both_lists_and_written_down(raw, labelled, tmp_path, caplog):
    numbers = run(raw, data={"dataset_val": rewritten(labelled, tmp_path, str, "val", skip=[1])})
    assert not caplog.records
    (tmp_path / "named").mkdir()
    name = ["moving right", "to the left", "zero"].__getitem__
    data = {
        "dataset_train": rewritten(labelled, tmp_path / "named", name),
        "dataset_val": rewritten(labelled, tmp_path / "named", name, "val", skip=[1]),
    }
    named = run(raw, folder=raw["folder"] + "-named", data=data)
    assert named["heads"] == numbers["heads"]
    written = (Path(raw["folder"] + "-named") / "classes.csv").read_text().splitlines()
    assert written[:4] == ["label,class", "0,moving right", "1,to the left", "2,zero"]
    with pytest.raises(
        ConfigError, match="dataset_train has the classes .'moving right'.*dataset_val has ..; both need"
    ):
        run(raw, folder=raw["folder"] + "-mixed", data={"dataset_train": data["dataset_train"]})


def test_unusual_labels_are_a_warning(raw, labelled, tmp_path, caplog):
    data = {"dataset_train": rewritten(labelled, tmp_path, lambda i: i + 1), "num_classes": 4}
    run(raw, data={**data, "dataset_val": rewritten(labelled, tmp_path, lambda i: i + 1, "val")})
    assert "no video has label 0" in caplog.text
    assert "set num_classes to 3" in caplog.text


@pytest.mark.parametrize("key", ["dataset_train", "dataset_val"])
def test_a_wrong_list_is_reported_under_its_own_key(raw, labelled, key, tmp_path):
    with pytest.raises(ConfigError, match=rf"^data\.{key}: 'gone\.csv': no such folder, list or file"):
        run(raw, data={key: "gone.csv"})
    (tmp_path / "list.csv").write_text("gone.mp4 1\n")
    with pytest.raises(ConfigError, match=rf"^data\.{key}: .*list\.csv: 1 of 1 checked files do not exist"):
        run(raw, data={key: str(tmp_path / "list.csv")})
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    with pytest.raises(ConfigError, match=rf"^data\.{key}: .*; data\.format=image_dataset reads \.png"):
        run(raw, data={key: str(tmp_path / "a")})


def test_a_side_of_a_square_is_one_number(raw):
    with pytest.raises(ConfigError, match=r"optimization\.resolution: expected the pixels of a square as one number"):
        options(raw, optimization={"resolution": [32, 48]})


@pytest.mark.parametrize("augmented", [False, True])
def test_a_resumed_probe_equals_one_without_a_stop(raw, augmented, tmp_path, monkeypatch):
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
    ours, theirs = (hub.load_probe(folder).state_dict() for folder in (raw["folder"], tmp_path / "straight"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in read_log(Path(raw["folder"]))] == [1, 2, 3]


def test_the_log_has_the_number_of_epochs(raw):
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
def test_an_unreadable_video_stops_the_probe_or_is_excluded_and_listed(raw, labelled, cached, tmp_path, caplog):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text((labelled / f"{name}.csv").read_text() + f"{broken.name} 0\n")
    data = {"dataset_train": str(tmp_path / "train.csv"), "dataset_val": str(tmp_path / "val.csv")}
    data["cache_features"] = cached
    with pytest.raises(VideoError, match="broken.mp4"):
        run(raw, data=data)
    assert "1 videos are in data.dataset_train and in data.dataset_val" in caplog.text
    results = run(raw, folder=str(tmp_path / "second"), data={**data, "on_bad_video": "exclude"})
    assert "2 unreadable files were excluded" in caplog.text
    assert [(bad["split"], bad["path"]) for bad in results["excluded"]] == [
        ("train", str(broken)),
        ("val", str(broken)),
    ]
    assert all(bad["reason"] for bad in results["excluded"])
    assert (results["num_train"], results["num_val"], len(predictions(tmp_path / "second"))) == (18, 12, 12)


def test_no_readable_validation_video_is_an_error_before_training(raw, monkeypatch, tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.mp4").write_bytes(b"no video")
    (tmp_path / "val.csv").write_text("0.mp4 0\n1.mp4 1\n")
    monkeypatch.setattr(fit.Fitter, "fit", None)
    with pytest.raises(ConfigError, match="data.dataset_val: .*val.csv: none of the 2 videos can be read"):
        run(raw, data={"dataset_val": str(tmp_path / "val.csv"), "on_bad_video": "exclude"})
    with pytest.raises(ConfigError, match="data.dataset_val: none"):
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
    encoder = build_encoder({"name": "vit_tiny", **model["encoder_args"]}, ClipShape(**data)).state_dict()
    target = {name: 2 * weight for name, weight in encoder.items()}
    config = {"model": model, "data": data}
    state = checkpoint.CheckpointState({"encoder": encoder, "target_encoder": target}, metadata={"config": config})
    checkpoint.save(tmp_path / "pretraining" / "checkpoints", 1, state, keep=1)
    (tmp_path / "pretraining" / "config.yaml").write_text(yaml.safe_dump(config))
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


def test_clips_are_normalized_as_in_pretraining(raw, run_folder, tmp_path):
    folder, _ = run_folder
    normalization = {"normalize_mean": (0.1, 0.2, 0.3), "normalize_std": (0.4, 0.5, 0.6)}
    for pretrain in ({"folder": str(folder)}, {"folder": str(folder), "checkpoint": "random"}):
        assert frozen(options({**raw, "pretrain": pretrain})).mean == (0.485, 0.456, 0.406)  # it does not say
    state = checkpoint.read(folder / "checkpoints" / "latest")
    state.metadata["config"]["data_aug"] = {"auto_augment": False, **normalization}
    checkpoint.save(folder / "checkpoints", 2, state, keep=1)
    for pretrain in ({"folder": str(folder)}, {"folder": str(folder), "checkpoint": "random"}):
        encoder = frozen(options({**raw, "pretrain": pretrain}))
        assert (encoder.mean, encoder.std) == (normalization["normalize_mean"], normalization["normalize_std"])
    assert frozen(options(raw)).mean == (0.485, 0.456, 0.406)
    own = frozen(options({**raw, "pretrain": {"folder": str(folder)}}, data={"normalize_mean": [0.5, 0.5, 0.5]}))
    assert (own.mean, own.std) == ((0.5, 0.5, 0.5), normalization["normalize_std"])
    tasks = {"augmented": {"data_aug": {"reprob": 0.5}}}
    run({**raw, "pretrain": {"folder": str(folder)}}, tasks=tasks)
    config = yaml.safe_load((Path(raw["folder"]) / "augmented" / "config.yaml").read_text())
    for section in ("data", "data_aug"):
        assert {name: tuple(config[section][name]) for name in normalization} == normalization


def test_bfloat16_probes_about_the_same(raw, tmp_path):
    full = run(raw, optimization={"min_steps": 60})
    half = run(raw, folder=str(tmp_path / "half"), optimization={"min_steps": 60, "use_bfloat16": True})
    assert half["encoder"] == full["encoder"]
    for ours, theirs in zip(half["heads"], full["heads"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], abs=0.15)


def test_a_simple_task_is_learned(raw):
    """The features of a random encoder suffice to fit the training videos."""
    results = run(raw, optimization={"min_steps": 200, "heads": None, "lr": 3e-3}, data={"cache_features": True})
    assert results["train_loss"] < 0.05
    assert results["train_top1"] == 100


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"dataset_train": "nowhere.csv"}}, "nowhere.csv.*no such"),
        ({"data": {"num_classes": 2}}, "train2.mp4 has label 2; with num_classes 2"),
        ({"data": {"labels_per_class": 7}}, "labels_per_class is 7, but class 0 has only 6"),
        (
            {"data": {"labels_per_class": 2, "label_fraction": 0.5}},
            "labels_per_class and label_fraction given; keep one",
        ),
        ({"data": {"label_fraction": 1.5}}, "data.label_fraction"),
        ({"data": {"frames_per_clip": 1}, "evaluation": {"shuffle_frames": True}}, "an image has no order of frames"),
        ({"head": {"name": "knn", "lr": 1e-3}}, "head.lr: unknown key"),
        ({"data": {"frames_per_clip": 3}}, "frames_per_clip 3.*tubelet"),
        ({"data": {"cache_features": True}, "data_aug": {}}, "cache_features stores one version"),
        ({"optimization": {"resolution": 36}}, "resolution 36.*patch"),
        ({"optimization": {"learning_rate": 1.0}}, "optimization.learning_rate: unknown key"),
        ({"optimization": {"holdout_folds": 6}}, "only 5 disjoint parts"),
        ({"optimization": {"warmup": 4.0}}, "warmup: 4.0 epochs of warm-up do not fit into 3 epochs"),
        ({"data": {"fps": 4.0}}, "frame_step and fps given; keep one of"),
        ({"distributed": "fsdp"}, "the encoder of a probe is not sharded"),
        ({"pretrain": {"checkpoint": None, "folder": "nowhere"}}, "pretrain.folder: nowhere does not exist"),
        ({"pretrain": {"checkpoint": None}}, "folder: give the run folder"),
        ({"pretrain": {"model_name": "vit_tinny"}}, "vit_tinny.*vit_tiny"),
        ({"pretrain": {"model_name": None}}, "encoder.name: a random encoder needs an architecture"),
        ({"tasks": {"few": {"data": {"labels": 3}}}}, "  tasks.few.data.labels: unknown key. Valid: cache, "),
        ({"tasks": {"other": {"pretrain": {"init_seed": 3}}}}, "all tasks probe one encoder"),
        ({"tasks": {"other": {"data": {"normalize_std": [1.0, 1.0, 1.0]}}}}, "other.data.normalize_std: all tasks"),
        ({"tasks": {"other": {"optimization": {"use_bfloat16": True}}}}, "other.optimization.use_bfloat16: all tasks"),
        ({"tasks": {"a": {}, "b": {"optimization": {"resolution": 36}}}}, "tasks.b: .*resolution 36.*patch"),
        ({"data_aug": {"normalize_mean": [0.0, 0.0, 0.0]}}, "data_aug.normalize_mean: clips are normalized by data.n"),
        ({"pretrain": {"encoder_args": {"out_layers": [1]}}}, "pretrain: encoder.out_layers: .*remove it"),
    ],
)
def test_invalid_options_are_errors_before_anything_is_computed(raw, sections, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        run(raw, **sections)
    assert not Path(raw["folder"]).exists()


def test_a_video_that_crashes_its_decoder_is_excluded_and_named(raw, labelled, monkeypatch, caplog):
    """As decoders written in C do it: the worker is gone, without an exception."""
    crashing = str(labelled / "val3.mp4")
    open_video = video_dataset.open_video

    def crash(path, decoder):
        if path == crashing:
            os.kill(os.getpid(), signal.SIGSEGV)
        return open_video(path, decoder)

    monkeypatch.setattr(video_dataset, "open_video", crash)
    monkeypatch.setattr(worker_monitor, "MAX_READ_SECONDS", 0.5)
    results = run(raw, data={"num_workers": 1, "worker_timeout": 3, "on_bad_video": "exclude", "cache_features": True})
    assert "1 unreadable files were excluded" in caplog.text
    assert [(bad["split"], bad["path"]) for bad in results["excluded"]] == [("val", crashing)]
    assert "worker crashed" in results["excluded"][0]["reason"]
    assert [row["path"] for row in predictions(raw["folder"])] == [
        str(labelled / f"val{i}.mp4") for i in range(12) if i != 3
    ]
