"""Calibration of a diffusion predictor's samples: against a slow version, on two processes, and refused runs."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import app.vjepa.options
import app.vjepa.train
from evals.predictor_calibration.eval import Options, main
from tests.processes import run as run_on_processes
from tubelet import config, hub
from tubelet.config import ConfigError
from tubelet.data import Draw, to_float
from tubelet.data.transforms import EvalTransform
from tubelet.data.video_dataset import Dataset
from tubelet.generation.calibration import SCORES
from tubelet.masks import build_collator
from tubelet.runtime.distributed import World
from tubelet.runtime.seeds import Purpose, numpy_generator, torch_generator

MASK = {"name": "multiblock3d", "num_blocks": 1, "spatial_scale": [0.5, 0.5]}
DRAWS = 4
OWN = ("climatology", "climatology_mean", "one_step")
OF_REFERENCE = ("mask_tokens", "mask_tokens_climatology_mean")


@pytest.fixture(scope="module")
def runs(labelled, tmp_path_factory):
    """Folders of short pretrainings by name: noised targets, mask tokens, SALT's with one teacher, VideoMAE."""
    folder = tmp_path_factory.mktemp("runs")
    small = {"depth": 1, "embed_dim": 16, "num_heads": 2, "init_std": 0.2}
    noised = small | {"use_mask_tokens": False, "noise_steps": 50}
    salt = {"name": "salt", "teacher": {"folder": str(folder / "masked")}}
    objectives = {
        "noised": {"name": "vjepa", "predictor": noised},
        "masked": {"name": "vjepa", "predictor": small},
        "salt_noised": salt | {"predictor": noised},
        "salt_masked": salt | {"predictor": small},
        "pixels": {"name": "videomae", "decoder": small},
    }
    for name, objective in objectives.items():
        raw = {
            "app": "vjepa",
            "folder": str(folder / name),
            "encoder": {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2, "init_std": 0.2},
            "objective": objective,
            "mask": [MASK, MASK],
            "data": {
                "datasets": [str(labelled / "train.csv")], "batch_size": 6, "num_frames": 8, "sampling_rate": 1,
                "crop_size": 32, "patch_size": 8, "num_workers": 0,
            },
            "optimization": {"epochs": 1, "ipe": 3, "warmup": 0, "start_lr": 1e-3, "lr": 1e-3},
            "meta": {"dtype": "float32"},
            "logging": {"monitor_clips": 0},
        }  # fmt: skip
        app.vjepa.train.main(config.check(raw, app.vjepa.options.Options, name), World())
    return folder


@pytest.fixture
def raw(runs, labelled, tmp_path):
    return {
        "eval_name": "predictor_calibration",
        "folder": str(tmp_path / "calibration"),
        "pretrain": {"folder": str(runs / "noised")},
        "mask_tokens": {"folder": str(runs / "masked")},
        "data": {"datasets": [str(labelled / "val.csv")], "num_clips": 5, "num_workers": 0},
        "draws": DRAWS,
        "samplers": [{"steps": 3}, {"steps": 3, "eta": 1.0}],
    }


def measure(raw, processes=1, **changes):
    options = config.check(copy.deepcopy(raw) | changes, Options, "options")
    run_on_processes(main, options, processes) if processes > 1 else main(options, World())
    return read(options)


def read(options):
    with open(f"{options.folder}/results.json", encoding="utf-8") as file:
        return json.load(file)


def test_results_equal_a_slow_version(raw, runs, labelled, tmp_path):
    results = measure(raw)
    assert (results["clips"], results["masks"], results["draws"]) == (5, 2, DRAWS)
    assert (tmp_path / "calibration" / "calibration.png").stat().st_size > 0

    run = config.load(runs / "noised" / "config.yaml", [], app.vjepa.options.Options)
    encoder, target = (hub.load_encoder(runs / "noised", key).eval() for key in ("encoder", "target_encoder"))
    predictor = hub.load_predictor(runs / "noised").eval()
    masked = [hub.load_encoder(runs / "masked", key).eval() for key in ("target_encoder", "encoder")]
    masked.append(hub.load_predictor(runs / "masked").eval())
    data = run.data.model_copy(update={"datasets": [str(labelled / "val.csv")], "random_clip_sampling": False})
    dataset = Dataset(data, EvalTransform(32))
    chosen = [i * 11 // 8 for i in range(9)]  # 9 of the 12 clips, evenly spaced
    others = [chosen[i] for i in (0, 2, 5, 8)]
    collator = build_collator(run.mask, run.data.clip_shape)

    def video(index):
        return to_float(dataset[Draw(0, 0, index, 0)].clips, run.data_aug.normalize_mean, run.data_aug.normalize_std)

    errors, variances, climatologies, of_mean, of_mask_tokens = [], [], [], [], []
    histogram = np.zeros(DRAWS + 1, int)
    directions = torch.randn(24, 16, generator=torch_generator(0, "directions"))
    directions /= directions.norm(dim=0)
    for number, index in enumerate(i for i in chosen if i not in others):
        masks = collator.sample_masks(1, numpy_generator(0, Purpose.MASKS, number, 0))
        for mask, (seen, hidden) in enumerate(zip(*masks, strict=True)):
            with torch.no_grad():
                truth = F.layer_norm(target(video(index)), (24,))[0, hidden[0]]
                context = encoder(video(index), seen)
                g = torch_generator(0, "draws", number, mask)
                draws = predictor.sample(context, seen, hidden, 3, DRAWS + 1, g)[:DRAWS, 0]
                other = torch.stack([F.layer_norm(target(video(i)), (24,))[0, hidden[0]] for i in others])
            scores = []
            for k in range(hidden.shape[1]):
                variances.append(float(draws[:, k].var(0).mean()) * (DRAWS + 1) / DRAWS)
                errors.append(float((draws[:, k].mean(0) - truth[k]).square().mean()))
                near = np.mean([float((other[m, k] - truth[k]).norm()) for m in range(4)])
                pairs = [float((other[a, k] - other[b, k]).norm()) for a in range(4) for b in range(a)]
                scores.append(near - np.mean(pairs) / 2)
                for direction in directions.T:
                    histogram[
                        sum(float(draws[m, k] @ direction) < float(truth[k] @ direction) for m in range(DRAWS))
                    ] += 1
            climatologies.append(np.mean(scores))
            of_mean.append(float((other.mean(0) - truth).norm(dim=1).mean()))
            with torch.no_grad():
                truth = F.layer_norm(masked[0](video(index)), (24,))[0, hidden[0]]
                prediction = masked[2](masked[1](video(index), seen), None, seen, hidden, mask)[0]
            of_mask_tokens.append(float((prediction - truth).norm(dim=1).mean()))
    measured = results["samplers"]["eta 0, 3 steps"]
    assert measured["error"] == pytest.approx(np.sqrt(np.mean(errors)), rel=1e-4)
    assert measured["spread"] == pytest.approx(np.sqrt(np.mean(variances)), rel=1e-4)
    assert results["forecasts"]["climatology"]["energy_score"] == pytest.approx(np.mean(climatologies), rel=1e-3)
    assert np.abs(np.array(measured["ranks"]["tokens"]["histogram"]) - histogram).sum() <= 4  # rounding
    forecasts = results["forecasts"]
    assert forecasts["climatology_mean"]["energy_score"] == pytest.approx(np.mean(of_mean), rel=1e-4)
    assert forecasts["mask_tokens"]["energy_score"] == pytest.approx(np.mean(of_mask_tokens), rel=1e-4)
    baselines = (measured, "climatology"), (forecasts["one_step"], "climatology_mean")
    baselines += ((forecasts["mask_tokens"], "mask_tokens_climatology_mean"),)
    for scores, baseline in baselines:
        for score in SCORES:
            assert scores["skill"][score] == pytest.approx(1 - scores[score] / forecasts[baseline][score])


def test_processes_share_the_clips(raw, tmp_path):
    one = measure(raw)
    two = measure(raw, processes=2, folder=str(tmp_path / "two"))
    assert two["clips"] == one["clips"]
    for name, expected in one["samplers"].items():
        assert two["samplers"][name]["ranks"] == expected["ranks"]
        assert two["samplers"][name]["spread_over_error"] == pytest.approx(expected["spread_over_error"], rel=1e-5)
    assert one["forecasts"].keys() == two["forecasts"].keys() == {*OWN, *OF_REFERENCE}
    for name, expected in one["forecasts"].items():
        for score in SCORES:
            assert two["forecasts"][name][score] == pytest.approx(expected[score], rel=1e-5)


def test_runs_with_one_teacher_are_measured_on_the_same_targets(raw, runs):
    folders = {"pretrain": {"folder": str(runs / "salt_noised")}, "mask_tokens": {"folder": str(runs / "salt_masked")}}
    forecasts = measure(raw, **folders)["forecasts"]
    assert forecasts["climatology_mean"] == forecasts["mask_tokens_climatology_mean"]
    assert forecasts["mask_tokens"]["energy_score"] != forecasts["one_step"]["energy_score"]


def test_masks_of_the_options_replace_those_of_the_run(raw):
    future = {"name": "multiblock3d", "num_blocks": 1, "spatial_scale": [0.1, 0.1], "max_temporal_keep": 0.5}
    results = measure(raw, mask=[future], mask_tokens=None)
    assert results["masks"] == 1
    assert set(results["forecasts"]) == set(OWN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain": "masked"}, r"pretrain\.folder: its predictor has mask tokens.*use_mask_tokens=false"),
        ({"pretrain": "pixels"}, r"pretrain\.folder: its objective, videomae, does not predict features"),
        ({"pretrain": "absent"}, r"absent does not exist; set pretrain\.folder"),
        ({"mask_tokens": "salt_noised"}, r"mask_tokens\.folder: its predictor has noised targets"),
        ({"samplers": [{"steps": 51}]}, r"samplers: 51 steps, .*noise_steps 50"),
        ({"draws": 12}, r"data\.datasets: 12 clips are too few"),
        ({"mask": [MASK] * 3}, r"mask_tokens\.folder has 2 mask token\(s\), fewer .*\(3\); shorten"),
        ({"samplers": [{"steps": 3}, {"steps": 3}]}, r"samplers: two entries are the same"),
    ],
)
def test_what_cannot_be_measured_is_refused(raw, runs, changes, message):
    folders = {key: {"folder": str(runs / value)} for key, value in changes.items() if isinstance(value, str)}
    with pytest.raises(ConfigError, match=message):
        measure(raw, **(changes | folders))
