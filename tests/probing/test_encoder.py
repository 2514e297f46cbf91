"""What tells one frozen encoder from another."""

import pytest
import torch

from tests.hub.weight_files import write_run
from tubelet.config import ConfigError
from tubelet.grid import ClipShape
from tubelet.models import build_encoder
from tubelet.probing.encoder import fingerprint, read_encoder
from tubelet.probing.options import PretrainConfig

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def build(name, args):
    torch.manual_seed(0)
    return build_encoder({"name": name, **SMALL, **args}, ClipShape(4, 32, 8, 2))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("windowed_tiny", {"window_size": [1, 2, 2]}),
        ("fastback_tiny", {"lookback_heads": 2}),
        ("vit_tiny", {"out_layers": [1]}),
    ],
)
def test_equal_weights_that_attend_otherwise_have_another_fingerprint(name, args):
    plain, same, other = (build(name, each) for each in ({}, {}, args))
    weights = plain.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in other.state_dict().items())
    assert fingerprint(plain) == fingerprint(same) != fingerprint(other)
    assert fingerprint(torch.nn.ModuleList([plain])) != fingerprint(torch.nn.ModuleList([other]))


def test_other_weights_have_another_fingerprint():
    plain, other = (build("vit_tiny", {}) for _ in range(2))
    with torch.no_grad():
        other.norm.bias += 1e-6
    assert fingerprint(plain) != fingerprint(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"encoder": {"use_rope": True}},
            "encoder.use_rope is false .*, here true; set use_rope=False, or leave it out",
        ),
        ({"encoder": {"uniform_power": False}}, "encoder.uniform_power is true"),
        ({"frames_per_clip": 16}, "num_frames is 4 .*, here 16; leave num_frames out"),
        ({"encoder": {"num_heads": 6}}, "encoder.num_heads is 3 .*, here 6"),
    ],
)
def test_options_that_contradict_the_run_are_refused_unless_its_weights_are_not_used(tmp_path, changes, message):
    write_run(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_encoder(PretrainConfig(folder=str(tmp_path), **changes), 4, 32)
    random = PretrainConfig(folder=str(tmp_path), checkpoint="random", **changes)
    assert read_encoder(random, 4, 32).grid.num_tokens > 0
