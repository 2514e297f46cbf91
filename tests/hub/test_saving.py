"""Modules that were trained without the Trainer, saved and loaded."""

import json

import pytest

from tests.hub.weight_files import DATA, same_encoder, same_predictor
from tubelet import hub
from tubelet.config import ConfigError
from tubelet.grid import ClipShape
from tubelet.models import build_encoder, build_predictor
from tubelet.runtime import checkpoint

CLIP = ClipShape(**DATA)
OPTIONS = {"name": "vit_tiny", "depth": 2, "init_std": 0.1}
NORMALIZATION = {"normalize_mean": (0.1, 0.2, 0.3), "normalize_std": (0.4, 0.5, 0.6)}


def parts(**options):
    encoders = {name: build_encoder(OPTIONS | options, CLIP).eval() for name in ("target_encoder", "encoder")}
    predictor = {"depth": 1, "embed_dim": 48}
    return encoders | {"predictor": build_predictor(predictor, encoders["encoder"], CLIP, num_mask_tokens=2).eval()}


@pytest.mark.parametrize("options", [{}, {"use_rope": True}, {"name": "timesformer_tiny"}])
def test_what_is_saved_is_loaded(tmp_path, options):
    saved = parts(**options)
    path = hub.save(tmp_path, saved, step=7, normalization=NORMALIZATION)
    assert checkpoint.step_of(path) == 7
    same_encoder(hub.load_encoder(tmp_path), saved["target_encoder"])
    same_encoder(hub.load_encoder(tmp_path, "encoder"), saved["encoder"])
    same_predictor(hub.load_predictor(tmp_path), saved["predictor"])
    assert hub.read(tmp_path).normalization() == NORMALIZATION


def test_the_first_encoder_is_the_default(tmp_path):
    saved = parts()
    hub.save(tmp_path, {"student": saved["encoder"], "teacher": saved["target_encoder"]})
    same_encoder(hub.load_encoder(tmp_path), saved["encoder"])
    same_encoder(hub.load_encoder(tmp_path, "teacher"), saved["target_encoder"])


def test_the_last_one_remains_whatever_its_step(tmp_path):
    saved, other = parts(), parts(depth=1)
    hub.save(tmp_path, other, step=4)
    path = hub.save(tmp_path, saved, step=2)
    assert checkpoint.find(tmp_path / "checkpoints") == [path]
    same_encoder(hub.load_encoder(tmp_path), saved["target_encoder"])


def test_checkpoints_of_a_run_are_not_removed(tmp_path):
    (tmp_path / "config.yaml").write_text("folder: x\n")
    with pytest.raises(ConfigError, match="is the folder of a run"):
        hub.save(tmp_path, parts())


def test_parts_that_do_not_belong_together(tmp_path):
    saved = parts()
    with pytest.raises(ConfigError, match="other: its options of encoder are "):
        hub.save(tmp_path, saved | {"other": parts(depth=1)["encoder"]})
    with pytest.raises(ConfigError, match="no encoder among predictor"):
        hub.save(tmp_path, {"predictor": saved["predictor"]})
    with pytest.raises(ConfigError, match=r"head: nothing says how it was built; .* build_encoder"):
        hub.save(tmp_path, saved | {"head": saved["encoder"].norm})
    assert not (tmp_path / "checkpoints").exists()


def test_metadata_is_that_of_a_run(tmp_path):
    """As JSON types, with the step, so that programs that read runs find what they need."""
    metadata = checkpoint.read_metadata(hub.save(tmp_path, parts(), step=3, normalization=NORMALIZATION))
    assert json.loads(json.dumps(metadata)) == metadata
    assert (metadata["step"], metadata["encoders"]) == (3, ["target_encoder", "encoder"])
