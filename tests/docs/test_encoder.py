"""The example of docs/extending/encoder.md encodes, trains and is probed."""

import math

import torch

from tests.docs.runs import make_options, train
from tubelet import hub
from tubelet.grid import ClipShape
from tubelet.models import build_encoder

NAME = "ideas.deep_sets.deep_sets_tiny"


def test_dropped_tokens_are_not_seen(checkout):
    torch.manual_seed(0)
    encoder = build_encoder({"name": NAME, "embed_dim": 48, "depth": 2, "num_heads": 2}, ClipShape(8, 32, 8, 2)).eval()
    clips = torch.randn(2, 3, 8, 32, 32)
    keep = torch.tensor([[0, 5, 9, 17], [1, 2, 3, 63]])
    masked, both = encoder(clips, keep), encoder(clips, [keep, keep[:, :2]])
    assert encoder(clips).shape == (2, 64, 48)
    assert masked.shape == (2, 4, 48)
    torch.testing.assert_close(both[0], masked)
    changed = clips.clone()
    changed[:, :, 4:6, :8, 8:16] += 10  # token 33, which no mask keeps
    torch.testing.assert_close(encoder(changed, keep), masked)
    assert not torch.allclose(encoder(changed), encoder(clips))


def test_encoder_trains(checkout, clips):
    options = make_options(clips, encoder={"name": NAME, "embed_dim": 48, "depth": 2, "num_heads": 2})
    first, last = train(options)
    assert math.isfinite(last["loss"])
    assert last["loss"] != first["loss"]
    loaded = hub.load_encoder(options.folder)
    assert type(loaded).__name__ == "DeepSets"
    assert loaded(torch.randn(1, 3, 8, 32, 32)).shape == (1, 64, 48)
