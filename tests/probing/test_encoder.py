"""What tells one frozen encoder from another."""

import pytest
import torch

from tubelet.grid import ClipShape
from tubelet.models import build_encoder
from tubelet.probing.encoder import fingerprint

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
