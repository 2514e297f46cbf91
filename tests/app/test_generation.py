"""Future-frame prediction end to end: training, resuming, rollout, feature decoder."""

import copy
import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.generation import train as program
from app.generation.train import build_model
from app.vjepa import options as pretraining_options
from app.vjepa.train import make_trainer as make_pretraining
from tests.processes import run as run_on_processes
from tubelet import config
from tubelet.config import ConfigError, UserError, check
from tubelet.generation.forecasts import roll_out
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.training.trainer import Trainer


@pytest.fixture(scope="module")
def flights(tmp_path_factory):
    """Moving MNIST's published layout: 12 clips of 12 frames with a bright square that flies to the right."""
    frames = np.zeros((12, 12, 64, 64), np.uint8)
    for t in range(12):
        for clip in range(12):
            frames[t, clip, 4 * clip : 4 * clip + 16, 4 * t : 4 * t + 16] = 255
    path = tmp_path_factory.mktemp("flights") / "mnist_test_seq.npy"
    np.save(path, frames)
    return str(path)


@pytest.fixture
def raw(flights, tmp_path):
    return {
        "app": "generation",
        "folder": str(tmp_path / "run"),
        "data": {
            "dataset_type": "moving_mnist",
            "train": [flights],
            "test": [flights],
            "num_frames": 4,
            "num_target_frames": 2,
            "tubelet_size": 2,
            "channels": 1,
            "crop_size": 32,
            "patch_size": 8,
            "batch_size": 4,
            "num_workers": 0,
        },
        "model": {
            "encoder": "generative_timesformer",
            "model_name": "generative_timesformer_tiny",
            "encoder_args": {"embed_dim": 24, "depth": 1, "num_heads": 2, "drop_rate": 0.1},
        },
        "optimization": {"steps": 8, "warmup": 2, "lr": 3e-3},
        "evaluation": {"num_frames": 5, "num_clips": 6, "pictures": 2},
        "logging": {"log_every": 1, "checkpoint_every_steps": 3, "monitor_every": 4, "monitor_clips": 5},
    }


def options_of(raw, **sections):
    raw = copy.deepcopy(raw)
    for name, change in sections.items():
        raw[name] = {**raw.get(name, {}), **change} if isinstance(change, dict) else change
    return check(raw, program.Options, "test.yaml")


def run(raw, **sections):
    options = options_of(raw, **sections)
    program.main(options, World())
    return json.loads((Path(options.folder) / "results.json").read_text())


def log(folder, *names):
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [[line.get(name) for name in names] for line in lines]


def assert_same(a, b, path="state"):
    """Bit for bit, all the way down; the configuration aside."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"config"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    else:
        assert a == b, path


def test_going_on_after_a_signal_is_as_never_stopping(raw, tmp_path, monkeypatch):
    expected = run(raw, folder=str(tmp_path / "straight"))
    update = Trainer.update

    def update_and_stop(trainer, clip_grad):
        if trainer.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer, clip_grad)

    monkeypatch.setattr(Trainer, "update", update_and_stop)
    with pytest.raises(SystemExit) as stopped:
        run(raw)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "run" / "results.json").exists()
    monkeypatch.setattr(Trainer, "update", update)
    results = run(raw)
    states = [checkpoint.read(tmp_path / folder / "checkpoints" / "latest") for folder in ("straight", "run")]
    assert_same(*map(dataclasses.asdict, states))
    assert states[0].metadata["step"] == 8
    numbers = ("step", "loss", "grad_norm", "lr", "test_mse")
    assert log(tmp_path / "straight", *numbers) == log(tmp_path / "run", *numbers)
    assert expected.pop("train_seconds") > 0
    results.pop("train_seconds")
    assert results == expected


def test_monitored_clips_that_cannot_be_read_are_a_warning(raw, monkeypatch, caplog):
    def unreadable(options, device):
        raise ConfigError("data.test: none of the 5 clips can be used")

    monkeypatch.setattr(program, "HeldOutError", unreadable)
    assert run(raw)["clips"] == 6
    assert "logging.monitor_clips: the error is not measured during training; data.test: none" in caplog.text


def test_two_processes_are_as_one(raw, tmp_path):
    without_dropout = {"encoder_args": {"embed_dim": 24, "depth": 1, "num_heads": 2}}
    expected = run(raw, folder=str(tmp_path / "one"), model=without_dropout)
    options = options_of(raw, model=without_dropout, data={"batch_size": 2})
    run_on_processes(program.main, options, processes=2)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["clips"] == expected["clips"] == 6
    assert results["model"]["per_frame"]["mse"] == pytest.approx(expected["model"]["per_frame"]["mse"], abs=1e-5)
    assert results["copy_last"] == expected["copy_last"]
    one, two = (np.array(log(tmp_path / folder, "loss", "test_mse"), dtype=float) for folder in ("one", "run"))
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_a_square_that_flies_is_predicted_better_than_by_the_rules(raw, tmp_path):
    results = run(
        raw,
        data={"crop_size": 16, "patch_size": 4, "batch_size": 12},
        model={"encoder_args": {"embed_dim": 32, "depth": 1, "num_heads": 2}, "use_rope": True},
        optimization={"steps": 150, "warmup": 10, "lr": 5e-3},
        evaluation={"num_frames": 2, "num_clips": None},
        logging={"log_every": 50, "checkpoint_every_steps": None, "monitor_every": 50},
    )
    assert results["clips"] == 12
    for rule in ("copy_last", "linear_extrapolation", "mean_of_seen"):
        assert results["mse_below_percent"][rule] > 40, results["mse_below_percent"]
        ratio = results["model"]["mse"] / results[rule]["mse"]
        assert results["mse_below_percent"][rule] == pytest.approx(100 * (1 - ratio), abs=0.1)
    errors = [mse for step, mse in log(tmp_path / "run", "step", "test_mse") if step in (50, 100, 150)]
    assert errors[-1] == pytest.approx(results["model"]["mse"], rel=0.3)  # five of the twelve clips
    assert errors[-1] < errors[0]


def test_a_finished_run_is_measured_further_ahead_without_training(raw, tmp_path, monkeypatch):
    near = run(raw)
    monkeypatch.setattr(Trainer, "update", None)
    assert run(raw)["model"] == near["model"]
    far = run(raw, evaluation={"num_frames": 8})
    assert len(far["model"]["per_frame"]["mse"]) == 8
    assert far["model"]["per_frame"]["ssim"][:5] == pytest.approx(near["model"]["per_frame"]["ssim"], abs=0.2)
    picture = np.asarray(Image.open(tmp_path / "run" / "prediction.png"))
    assert picture.shape[0] == 2 * (3 * 68 - 4) + 18  # two clips of 32 pixels, shown twice as large
    assert Image.open(tmp_path / "run" / "prediction.gif").n_frames == 4 + 8
    with pytest.raises(ConfigError, match=r"clips have 12 frames, but 13 are needed"):
        run(raw, evaluation={"num_frames": 9})
    with pytest.raises(ConfigError, match=r"optimization.lr: 0.003 there, 0.1 here"):
        run(raw, optimization={"lr": 0.1})


def test_videos_of_a_folder(raw, videos):
    data = {"dataset_type": "VideoDataset", "train": [str(videos)], "test": [str(videos)], "channels": 3}
    learning = {"data_aug": {"random_resize_scale": [0.8, 1.0]}, "meta": {"dtype": "bfloat16"}}
    results = run(raw, data=data, optimization={"steps": 2, "warmup": 0, "loss": "l1"}, **learning)
    assert results["clips"] == 6
    assert np.isfinite(results["model"]["per_frame"]["mse"]).all()
    assert results["excluded"] == []
    with pytest.raises(
        ConfigError, match="data.test: none of the 6 clips can be used; .* 14 frames, fewer than the 24"
    ):
        run(raw, folder=raw["folder"] + "2", data=data, evaluation={"num_frames": 20})


def test_a_model_whose_weights_are_not_finite_has_no_result(raw, monkeypatch):
    def poisoned(model, *rest, evaluate=program.evaluate):
        next(model.parameters()).data.fill_(float("nan"))
        return evaluate(model, *rest)

    monkeypatch.setattr(program, "evaluate", poisoned)
    with pytest.raises(UserError, match="results.json is not written: .*model.mse nan"):
        run(raw)
    assert not (Path(raw["folder"]) / "results.json").exists()


def test_where_nothing_moves_copying_cannot_be_beaten(raw, tmp_path):
    still = np.broadcast_to(np.random.default_rng(0).integers(0, 256, (1, 6, 64, 64), np.uint8), (12, 6, 64, 64))
    np.save(tmp_path / "still.npy", still)
    results = run(raw, data={"test": [str(tmp_path / "still.npy")]}, optimization={"steps": 1, "warmup": 0})
    for rule in ("copy_last", "linear_extrapolation"):
        assert (results[rule]["mse"], results[rule]["psnr"]) == (0, 100)
        assert results["mse_below_percent"][rule] is None


@pytest.fixture(scope="module")
def pretrained(videos, tmp_path_factory):
    """Run folders of a tiny V-JEPA, with mask tokens and with a diffusion-noised predictor."""
    folders = {}
    for kind, use_mask_tokens in (("mask tokens", True), ("noise", False)):
        raw = {
            "app": "vjepa",
            "folder": str(tmp_path_factory.mktemp(kind)),
            "data": {
                "datasets": [str(videos)],
                "num_frames": 8,
                "tubelet_size": 2,
                "sampling_rate": 1,
                "crop_size": 32,
                "patch_size": 8,
            },
            "mask": [{"max_temporal_keep": 0.5, "spatial_scale": [0.1, 0.1]}],
            "model": {
                "model_name": "vit_tiny",
                "encoder_args": {"embed_dim": 48, "depth": 1, "num_heads": 2},
                "init_std": 0.1,
                "pred_depth": 1,
                "pred_embed_dim": 24,
                "use_mask_tokens": use_mask_tokens,
                "zero_init_mask_tokens": False,
            },
            "optimization": {"epochs": 1, "warmup": 0},
        }
        options = check(raw, pretraining_options.Options, "pretrain.yaml")
        training = make_pretraining(options, options.optimization.schedule(1), World())
        checkpoint.save(Path(options.folder) / "checkpoints", 0, training.state(), keep=1)
        folders[kind] = options.folder
    return folders


@pytest.fixture
def decoder_sections(raw, videos, pretrained):
    """`decoder_sections(kind, **sections)`: the configuration for a pretrained predictor of that kind."""

    def sections(kind, **pretrain):
        data = {"dataset_type": "VideoDataset", "train": [str(videos)], "test": [str(videos)], "channels": 3}
        return {
            "data": data | {"num_frames": 4, "num_target_frames": 4},
            "model": None,
            "pretrain": {"folder": pretrained[kind], "sampling_steps": 3, **pretrain},
            "decoder": {"embed_dim": 24, "depth": 1, "num_heads": 2},
            "evaluation": {"draws": 3},
        }

    return sections


@pytest.mark.parametrize("kind", ["mask tokens", "noise"])
def test_the_decoder_learns_and_what_was_pretrained_stays(raw, decoder_sections, kind, tmp_path):
    options = options_of(raw, **decoder_sections(kind))
    before = copy.deepcopy(build_model(options).frozen.state_dict())
    trainer = program.make_trainer(options, World())
    model = trainer.objective.model
    decoder = copy.deepcopy(model.decoder.state_dict())
    results = run(raw, **decoder_sections(kind))
    assert results["steps"] == 8
    losses = [loss for (loss,) in log(tmp_path / "run", "loss")]
    assert losses[-1] < losses[0]
    assert trainer.resume()
    assert_same(model.frozen.state_dict(), before)
    assert all(not torch.equal(decoder[name], value) for name, value in model.decoder.state_dict().items())
    columns = 2 if kind == "mask tokens" else 4  # truth, and one answer or three draws
    assert Image.open(tmp_path / "run" / "prediction.gif").width == columns * (128 + 8)


def test_decoded_features_are_predicted_from_the_seen_frames_alone(raw, decoder_sections):
    model = build_model(options_of(raw, **decoder_sections("mask tokens"))).eval()
    video = torch.rand(2, 3, 8, 32, 32)
    seen, hidden = torch.arange(32).expand(2, -1), torch.arange(32, 64).expand(2, -1)
    normalised = (video - model.mean) / model.std
    context = model.frozen["encoder"](normalised)  # of a clip that is all seen, only with the mask is it this one
    masked = model.frozen["encoder"](normalised, seen)
    assert not torch.allclose(context[:, :32], masked, atol=1e-3)
    features = model.frozen["predictor"](masked, None, seen, hidden, 0)
    torch.testing.assert_close(model.predict_features(video[:, :, :4]), features)
    frames = model(video[:, :, :4])
    torch.testing.assert_close(frames, model.decoder(features))
    further = roll_out(model, video[:, :, :4], 7)
    torch.testing.assert_close(further[:, :, 4:], model(frames.clamp(0, 1))[:, :, :3].clamp(0, 1))


def test_a_decoder_may_learn_from_the_features_of_the_true_frames(raw, decoder_sections):
    model = build_model(options_of(raw, **decoder_sections("mask tokens", learn_from="targets")))
    seen, future = torch.rand(2, 3, 4, 32, 32), torch.rand(2, 3, 4, 32, 32)
    features = model.frozen["target_encoder"]((torch.cat([seen, future], dim=2) - model.mean) / model.std)
    features = torch.nn.functional.layer_norm(features, (48,))[:, 32:]
    torch.testing.assert_close(model(seen, future), model.decoder(features))
    torch.testing.assert_close(model(seen), model.decoder(model.predict_features(seen)))


def test_draws_differ_and_each_is_always_the_same(raw, decoder_sections):
    model = build_model(options_of(raw, **decoder_sections("noise"))).eval()
    seen = torch.rand(2, 3, 4, 32, 32)
    assert model.is_stochastic
    assert torch.equal(model(seen, draw=1), model(seen, draw=1))
    assert not torch.equal(model(seen, draw=1), model(seen, draw=2))
    assert not torch.equal(model(seen), model(seen))


def test_other_weights_than_at_the_start_are_refused(raw, decoder_sections, pretrained):
    run(raw, **decoder_sections("mask tokens"))
    state = checkpoint.read(Path(pretrained["mask tokens"]) / "checkpoints" / "latest")
    state.weights["predictor"]["predictor_proj.bias"] += 1
    moved = Path(raw["folder"]).parent / "went on"
    checkpoint.save(moved / "checkpoints", 1, state, keep=1)
    trainer = program.make_trainer(options_of(raw, **decoder_sections("mask tokens", folder=str(moved))), World())
    with pytest.raises(checkpoint.CheckpointError, match="holds other weights than at the start of this run"):
        trainer.resume()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": None}, "give either `encoder`, .* or `pretrain`"),
        ({"pretrain": {"folder": "runs/x"}}, "give either `encoder`, .* or `pretrain`"),
        ({"model": None, "pretrain": {"folder": "runs/x"}}, "data.channels: 1, but pretraining sees colors"),
        ({"distributed": "fsdp"}, "take ddp"),
        ({"data": {"dataset_type": "moving_mist"}}, "data.dataset_type: 'moving_mist': .*Did you mean 'moving_mnist'"),
        ({"data": {"num_frames": 1}}, "data.num_frames"),
        ({"optimization": {"loss": "l3"}}, "optimization.loss"),
        ({"data": {"train": ["nowhere.npy"]}}, "'nowhere.npy': no such file"),
        ({"data": {"crop_size": 36}}, "crop_size 36 is not divisible by patch_size 8"),
        ({"data": {"num_target_frames": 3}}, "num_target_frames 3 cannot be cut into tubelets of 2"),
        (
            {"model": {"encoder": "vision_transformer", "model_name": "vit_tiny", "encoder_args": {}}},
            "vit_tiny predicts no frames; take encoder.name=generative_timesformer_small",
        ),
        ({"model": {"encoder_args": {"in_chans": 1}}}, "encoder.in_chans: already set by the section data"),
    ],
)
def test_impossible_configurations_are_refused_before_training(raw, tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        run(raw, **sections)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"folder": "nowhere"}, "nowhere does not exist"),
        ({"mask_index": 1}, "pretrain.mask_index: 1, but the predictor has 1 mask token"),
    ],
)
def test_impossible_pretrained_models(raw, decoder_sections, sections, message):
    with pytest.raises(ConfigError, match=message):
        build_model(options_of(raw, **decoder_sections("mask tokens", **sections)))


def test_the_message_names_the_sizes_of_the_pretraining(raw, decoder_sections):
    sections = decoder_sections("mask tokens")
    sections["data"] |= {"crop_size": 64, "num_frames": 6}
    with pytest.raises(
        ConfigError, match="data.crop_size=32 instead of 64, .*num_target_frames = 8 instead of 6 [+] 4"
    ):
        build_model(options_of(raw, **sections))
    with pytest.raises(
        ConfigError, match="sampling_steps: 2000, but the noise schedule of the predictor has only 1000"
    ):
        build_model(options_of(raw, **decoder_sections("noise", sampling_steps=2000)))


@pytest.mark.parametrize("path", sorted(Path("configs/generation").glob("*.yaml")), ids=lambda path: path.name)
def test_configurations_can_be_read(path):
    raw = config.read(path)
    schema = {"generation": program.Options, "vjepa": pretraining_options.Options}[raw["app"]]
    check(raw, schema, path)
