"""Every shipped configuration of an evaluation is one that its program takes."""

import importlib
from pathlib import Path

import pytest

from tubelet import config
from tubelet.probing.options import ProbeOptions

FILES = sorted(Path("configs/evals").glob("*.yaml"))


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "base.yaml"], ids=lambda path: path.stem)
def test_a_shipped_configuration_is_accepted(path):
    program = importlib.import_module(f"evals.{config.read(path)['eval_name']}.eval")
    options = config.load(path, [], program.Options)
    if issubclass(program.Options, ProbeOptions):
        assert all(rate > 0 for rate, _ in options.optimization.grid())


def test_the_published_settings():
    program = importlib.import_module("evals.video_classification_frozen.eval")
    clips = {}
    for name in ("vitl16_k400", "vitl16_ssv2"):
        data = config.load(f"configs/evals/{name}.yaml", [], program.Options).data
        clips[name] = (data.frames_per_clip, data.num_segments, data.num_views_per_segment)
    assert clips == {"vitl16_k400": (16, 8, 3), "vitl16_ssv2": (16, 2, 3)}
    heads = config.load("configs/evals/vjepa2_vitl16_256_ssv2.yaml", [], program.Options)
    assert (len(heads.optimization.grid()), heads.head.num_probe_blocks) == (20, 4)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_shipped_configuration_overrides_the_architecture_of_a_run_or_published_file(path):
    """Weights would mean something else under another one; a run and the published files say theirs."""
    pretrain = config.read(path).get("pretrain", {})
    assert not set(pretrain) - {"folder", "checkpoint", "checkpoint_key"}, pretrain
