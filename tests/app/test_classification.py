import copy
import json
from pathlib import Path

import av
import matplotlib.figure  # noqa: F401 - imported once for all processes, which are forked
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from app.classification import train as program
from app.classification.data import Videos
from tests.processes import run as run_on_processes
from tests.stops import stopped_at
from tubelet import hub
from tubelet.config import ConfigError, UserError, check, load
from tubelet.config import read as load_yaml
from tubelet.grid import ClipShape
from tubelet.models import build_encoder
from tubelet.objectives.supervised import PairMixing
from tubelet.probing.encoder import load as load_pretrained
from tubelet.probing.encoder import with_normalization
from tubelet.probing.options import PretrainConfig
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.training.trainer import Trainer

MULTISCALE = {"encoder": "multiscale", "model_name": "multiscale_tiny"}
TIMESFORMER = {"encoder": "timesformer", "model_name": "timesformer_tiny"}


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


def test_time_slots_are_read_and_shuffled_frames_are_classified_too(raw):
    results = run(raw, head="linear_slots", data={"num_segments": 2}, evaluation={"shuffle_frames": True})
    assert results["top1"] == results["shuffled_top1"] == 100  # brightness is the same in any order
    assert hub.load_encoder(raw["folder"], "encoder").embed_dim == 24


def test_a_run_that_diverges_has_no_result(raw, monkeypatch):
    def poisoned(trainer, *rest, validate=program.validate):
        next(trainer.objective.parameters()).data.fill_(float("nan"))
        return validate(trainer, *rest)

    monkeypatch.setattr(program, "validate", poisoned)
    with pytest.raises(UserError, match="no head has a finite loss in validation"):
        run(raw, optimization={"num_epochs": 2})
    assert not (Path(raw["folder"]) / "results.json").exists()
    assert not (Path(raw["folder"]) / "predictions.csv").exists()


def test_a_head_that_is_not_trained_by_gradient_descent_is_refused(raw):
    with pytest.raises(ConfigError, match="head: .*knn: it cannot train an encoder"):
        run(raw, head="knn")


ALL_DRAWS = {
    "data_aug": {},
    "model": {
        "model_name": "vit_tiny",
        "encoder_args": {"embed_dim": 24, "depth": 2, "num_heads": 2, "drop_rate": 0.2},
    },
    "optimization": {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1, "layer_decay": 0.7, "accumulation_steps": 2},
}


def test_going_on_after_a_stop_is_as_never_stopping(raw, tmp_path):
    raw["optimization"] |= ALL_DRAWS["optimization"] | {"num_epochs": 3}
    sections = ALL_DRAWS | {"optimization": {}, "logging": {"checkpoint_every_steps": 1, "log_every": 1}}
    straight = run(raw, folder=str(tmp_path / "straight"), **sections)
    with stopped_at(5):
        run(raw, **sections)
    assert run(raw, **sections) == straight
    ours, theirs = (last_state(folder) for folder in (raw["folder"], tmp_path / "straight"))
    for part in ("encoder", "classifier"):
        assert all(torch.equal(ours.weights[part][name], x) for name, x in theirs.weights[part].items())
    assert losses(raw["folder"]) == losses(tmp_path / "straight")


def last_state(folder):
    return checkpoint.read(checkpoint.newest(Path(folder) / "checkpoints"))


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


@pytest.mark.parametrize(("mixed", "global_batch", "videos"), [(False, 6, 7), (True, 12, 12)])
def test_several_processes_do_what_one_does(raw, lists, mixed, global_batch, videos, tmp_path):
    """With a broken video among them. Of three processes one or two have no part of an epoch's last batch."""
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for name, count in (("train", videos), ("val", 5)):
        lines = (lists / f"{name}.csv").read_text().splitlines()[:count]
        (tmp_path / f"{name}.csv").write_text("\n".join([*lines[:2], "broken.mp4 0", *lines[2:]]))
        raw["data"][f"dataset_{name}"] = str(tmp_path / f"{name}.csv")
    raw["data"] |= {"on_bad_video": "exclude", "num_views_per_segment": 2}
    raw["optimization"]["num_epochs"] = 4
    raw["logging"] = {"monitor_every": 3, "monitor_clips": 4}
    raw["evaluation"] = {"shuffle_frames": True}
    if mixed:
        raw["optimization"] |= {"mixup": 0.8, "cutmix": 1.0, "layer_decay": 0.7, "label_smoothing": 0.1}
    found = {}
    for processes in (1, 2, 3):
        raw["folder"] = str(tmp_path / str(processes))
        raw["optimization"]["batch_size"] = global_batch // processes
        if mixed and processes == 3:
            raw["optimization"]["accumulation_steps"] = 2
        run_on_processes(program.main, check(raw, program.Options, "test.yaml"), processes)
        results = json.loads((tmp_path / str(processes) / "results.json").read_text())
        results["train_loss"] = pytest.approx(results["train_loss"], rel=1e-4)
        found[processes] = results, losses(raw["folder"])
    results, expected = found[1]
    assert (results["num_train"], results["num_val"], len(results["excluded"]), len(expected)) == (videos, 5, 1, 8)
    for processes in (2, 3):
        assert found[processes][0] == results
        assert found[processes][1] == pytest.approx(expected, rel=1e-4)


@pytest.fixture
def pretrained(tmp_path):
    """A run of app.vjepa, as far as it matters here."""
    model = {"model_name": "vit_tiny", "encoder_args": {"embed_dim": 24, "depth": 2, "num_heads": 2}}
    data = {"crop_size": 32, "num_frames": 4, "patch_size": 8, "tubelet_size": 2}
    torch.manual_seed(0)
    weights = build_encoder({"name": "vit_tiny", **model["encoder_args"]}, ClipShape(**data)).state_dict()
    state = checkpoint.CheckpointState(
        {"encoder": {}, "target_encoder": weights}, metadata={"config": {"model": model, "data": data}}
    )
    checkpoint.save(tmp_path / "pretraining" / "checkpoints", 1, state, keep=1)
    return tmp_path / "pretraining", weights


def new_trainer(raw):
    options = with_normalization(check(raw, program.Options, "test.yaml"))
    return program.make_trainer(options, Videos(options, World()), World())


def test_fine_tuning_starts_from_the_runs_weights_and_changes_them(raw, pretrained):
    folder, weights = pretrained
    del raw["model"], raw["data"]["patch_size"]
    raw["pretrain"] = {"folder": str(folder)}
    raw["optimization"] |= {"layer_decay": 0.5, "num_epochs": 2}
    start = new_trainer(raw).objective.encoder.state_dict()
    assert start.keys() == weights.keys()
    assert all(torch.equal(start[name], weights[name]) for name in weights)
    run(raw)
    learned = last_state(raw["folder"]).weights["encoder"]

    def change(name):
        return float((learned[name] - weights[name]).abs().mean())

    assert 0 < change("patch_embed.proj.weight") < change("blocks.0.mlp.fc1.weight") < change("blocks.1.mlp.fc1.weight")


def test_a_trained_encoder_is_read_like_a_pretrained_one(raw, tmp_path):
    run(raw, data={"normalize_mean": [0.5, 0.4, 0.3]}, optimization={"num_epochs": 1, "warmup": 0})
    weights = last_state(tmp_path / "run").weights["encoder"]
    for key in ("encoder", "target_encoder"):
        torch.testing.assert_close(dict(hub.load_encoder(tmp_path / "run", key).state_dict()), dict(weights))
    assert hub.read(tmp_path / "run").normalization()["normalize_mean"] == (0.5, 0.4, 0.3)
    drawn = load_pretrained(PretrainConfig(folder=str(tmp_path / "run"), checkpoint="random"), 4, 32)
    assert {name: x.shape for name, x in drawn.state_dict().items()} == {name: x.shape for name, x in weights.items()}


def test_fine_tuning_normalises_clips_as_the_pretraining_did(raw, pretrained):
    folder, _ = pretrained
    state = last_state(folder)
    grey = {"normalize_mean": (0.1, 0.2, 0.3), "normalize_std": (0.4, 0.5, 0.6)}
    state.metadata["config"]["data_aug"] = grey
    checkpoint.save(folder / "checkpoints", 2, state, keep=1)
    del raw["model"], raw["data"]["patch_size"]
    run(raw, pretrain={"folder": str(folder)}, data_aug={"reprob": 0.5}, optimization={"num_epochs": 1, "warmup": 0})
    config = load_yaml(Path(raw["folder"]) / "config.yaml")
    for section in (config["data"], config["data_aug"], last_state(raw["folder"]).metadata["config"]["data_aug"]):
        assert {name: tuple(section[name]) for name in grey} == grey


@pytest.mark.parametrize("finished", [True, False])
def test_other_videos_or_labels_under_the_same_name_are_refused(raw, lists, finished, tmp_path):
    raw["data"]["dataset_train"] = str(tmp_path / "train.csv")
    raw["optimization"] |= {"num_epochs": 1, "warmup": 0}
    lines = (lists / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join(lines))
    first = run(raw)
    assert run(raw) == first
    if not finished:
        (Path(raw["folder"]) / "results.json").unlink()
    (tmp_path / "train.csv").write_text("\n".join([lines[0][:-1] + "1", *lines[1:]]))
    with pytest.raises(ConfigError, match="a run on other videos or labels"):
        run(raw)


def test_image_folders_of_other_classes_are_refused(raw, tmp_path):
    for place in ("train/green", "train/red", "val/blue", "val/red"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / place / "0.png")
    lists = {f"dataset_{name}": str(tmp_path / name) for name in ("train", "val")}
    with pytest.raises(ConfigError, match=r"class folders \['green', 'red'\], data.dataset_val has \['blue', 'red'\]"):
        run(raw, data={**lists, "dataset_type": "image_dataset"})


def test_no_readable_validation_video_is_said_before_training(raw, monkeypatch, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "val.csv").write_text("broken.mp4 0\n")
    monkeypatch.setattr(Trainer, "update", None)
    with pytest.raises(ConfigError, match="data.dataset_val: .*none of the 1 videos can be read"):
        run(raw, data={"dataset_val": str(tmp_path / "val.csv"), "on_bad_video": "exclude"})


def test_monitored_clips_that_cannot_be_read_are_a_warning(raw, lists, tmp_path, caplog):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "val.csv").write_text("broken.mp4 0\n" + (lists / "val.csv").read_text())
    data = {"dataset_val": str(tmp_path / "val.csv"), "on_bad_video": "exclude"}
    logging = {"monitor_every": 3, "monitor_clips": 1}
    results = run(raw, data=data, logging=logging, optimization={"num_epochs": 2})
    assert results["num_val"] == 6
    assert "val_top1 of the logging.monitor_clips clips is not measured" in caplog.text


@pytest.mark.parametrize("encoder", ["timesformer", "vivit"])
def test_an_image_vit_gives_its_weights(raw, encoder, tmp_path):
    image = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7)
    torch.save(image.state_dict(), tmp_path / "image.pth")
    raw["model"] = {"encoder": encoder, "model_name": f"{encoder}_tiny"}
    raw["image_vit"] = {"timm_name": "vit_tiny_patch16_224", "weights": str(tmp_path / "image.pth")}
    video = new_trainer(raw).objective.encoder
    for name, weight in image.blocks[11].state_dict().items():
        assert torch.equal(video.blocks[11].state_dict()[name], weight)
    torch.testing.assert_close(video.patch_embed.proj.weight.sum(2), image.patch_embed.proj.weight)
    raw["model"]["encoder_args"] = {"depth": 2}
    with pytest.raises(ConfigError, match=r"\(192, 12, 3, 16\), of this encoder \(192, 2, 3, 16\)"):
        new_trainer(raw)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_learns_about_the_same(raw, dtype, tmp_path):
    full = run(raw)
    half = run(raw, folder=str(tmp_path / "half"), meta={"dtype": dtype})
    assert half["train_loss"] == pytest.approx(full["train_loss"], abs=0.1)


def test_accumulated_parts_make_one_step(raw, tmp_path):
    raw["optimization"]["num_epochs"] = 2
    whole = run(raw, logging={"log_every": 1})
    parts = run(raw, folder=str(tmp_path / "parts"), optimization={"accumulation_steps": 4})
    assert parts["train_loss"] == pytest.approx(whole["train_loss"], rel=1e-5)
    assert losses(tmp_path / "parts") == pytest.approx(losses(raw["folder"]), rel=1e-5)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_labels_are_the_weights_of_the_pixels(mixup, cutmix):
    """Sample i is all i: the mean of a mixed clip is the mean of what is in it."""
    labels = torch.arange(6)
    clips = labels.float().view(6, 1, 1, 1, 1, 1).expand(6, 2, 3, 4, 16, 16).flatten(0, 1)
    mixing = PairMixing(mixup, cutmix, num_classes=6, seed=3)
    mixed, weights = mixing(clips, labels, 5, list(range(6)))
    clips, mixed = clips.unflatten(0, (6, 2)), mixed.unflatten(0, (6, 2))
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    torch.testing.assert_close(mixed.mean((1, 2, 3, 4, 5)), weights @ labels.float())
    assert (weights > 0).sum(1).max() == 2
    assert not torch.equal(weights[0, :2].sort().values, weights[2, 2:4].sort().values)  # each pair has its own weight
    every_frame = mixed.flatten(1, 3)
    assert torch.equal(every_frame, every_frame[:, :1].expand_as(every_frame))
    # The second process's part, with a sample that could not be read.
    part, part_weights = mixing(clips[[2, 4, 5]].flatten(0, 1), labels[[2, 4, 5]], 5, [2, 4, 5])
    part = part.unflatten(0, (3, 2))
    assert torch.equal(part[1:], mixed[4:])
    assert torch.equal(part_weights[1:], weights[4:])
    assert torch.equal(part[0], clips[2])


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimization": {"resolution": 40}}, "optimization.resolution.*40"),
        ({"optimization": {"warmup": 9.0}}, "warmup: 9.0 epochs of warm-up do not fit into 8"),
        ({"optimization": {"accumulation_steps": 3}}, "accumulation_steps: 3 does not divide batch_size 4"),
        ({"optimization": {"mixup": 0.8, "batch_size": 3}}, "mix pairs, 3 is odd"),
        ({"optimization": {"layer_decay": 0.7}, "model": MULTISCALE}, "layer_decay: .* has no `blocks`"),
        ({"model": None}, "give either `pretrain`, a pretrained encoder, or `encoder`, one to train from scratch"),
        ({"image_vit": {"weights": "nowhere.pth"}, "model": None}, "image_vit: give the `encoder`"),
        ({"pretrain": {"folder": "nowhere"}}, "remove `encoder`"),
        ({"pretrain": {"folder": "nowhere"}, "model": None}, "data.patch_size.*has its own"),
        ({"image_vit": {"weights": "nowhere.pth"}}, "VisionTransformer cannot start from an image ViT"),
        ({"image_vit": {"weights": "nowhere.pth"}, "model": TIMESFORMER}, "nowhere.pth: no such file"),
        ({"distributed": "fsdp"}, "take ddp"),
        ({"data": {"fps": 2.0}}, "frame_step and fps given"),
        ({"data_aug": {"normalize_std": [1.0, 1.0, 1.0]}}, "data_aug.normalize_std: clips are normalized by data.norm"),
        ({"model": TIMESFORMER | {"encoder_args": {"num_classes": 2}}}, "encoder.num_classes: .*remove it"),
    ],
)
def test_what_cannot_work_is_an_error_before_anything_is_computed(raw, sections, message):
    for name, change in sections.items():
        raw[name] = change if name in ("model", "distributed") else {**raw.get(name, {}), **change}
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        run(raw)
    assert not Path(raw["folder"]).exists()


def test_another_global_batch_is_refused(raw):
    raw["optimization"]["num_epochs"] = 2
    run(raw)
    (Path(raw["folder"]) / "results.json").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"take 4 samples, optimization.batch_size times .* is 2 here"):
        run(raw, optimization={"batch_size": 2})


@pytest.mark.parametrize("path", sorted(Path("configs/supervised").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_configuration_is_accepted(path):
    # Those of studies get the encoder from them.
    overrides = [] if "pretrain" in load_yaml(path) else ["encoder=vit_tiny"]
    load(path, overrides, program.Options)
