"""The contract of encoders. A new file in tubelet/models is tested here without further registration.

A small instance of each class is built by the first factory of its file, once for each value of its Literal options.
"""

import functools
import inspect
import math
from typing import Literal, get_args, get_origin

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from app.vjepa.options import Options
from tests.models.tokens import random_masks, take
from tubelet.config import ConfigError, check
from tubelet.config.factories import product
from tubelet.grid import ClipShape
from tubelet.models import ENCODERS, build_encoder
from tubelet.runtime.parallelize import compile_blocks

FRAMES, HEIGHT, WIDTH, GRID = 8, 32, 40, (4, 4, 5)
N = math.prod(GRID)
# Options that make an encoder small; a factory gets those that it accepts. Windows and lateral connections are small
# enough to matter on the small grid.
SMALL = {
    "depth": 2, "embed_dim": 48, "num_heads": 4, "window_size": (2, 3, 3), "fast_embed_dim": 24, "frame_stride": 2,
    "lateral_every": 1, "head_dim": 12,
}  # fmt: skip


def find_cases():
    """Name of the case -> name of the factory and the option that is chosen."""
    cases = {}
    of_classes = {}
    for name, factory in ENCODERS.available().items():
        of_classes.setdefault(product(factory), name)
    for name in of_classes.values():
        cases[name] = (name, {})
        for option, field in ENCODERS.locate({"name": name})[0].model_fields.items():
            if get_origin(field.annotation) is Literal and option != "rope_pairing":
                for choice in set(get_args(field.annotation)) - {field.default}:
                    cases[f"{name}-{choice}"] = (name, {option: choice})
    return dict(sorted(cases.items()))


CASES = find_cases()
every_encoder = pytest.mark.parametrize("case", CASES)


def accepted(case):
    return inspect.signature(ENCODERS.find(CASES[case][0])).parameters


def build(case, seed=0, *, crop_size=(HEIGHT, WIDTH), num_frames=FRAMES, **arguments):
    name, chosen = CASES[case]
    small = {option: value for option, value in SMALL.items() if option in accepted(case)}
    if "num_heads" in small:  # which determines the head width
        small.pop("head_dim", None)
    torch.manual_seed(seed)
    clip = ClipShape(num_frames, crop_size, patch_size=8, tubelet_size=2)
    return build_encoder({"name": name, **small, **chosen, **arguments}, clip).eval()


@functools.cache
def encoder(case):
    """A cached encoder for tests that do not modify it."""
    return build(case)


def clips(batch=2, frames=FRAMES, height=HEIGHT, width=WIDTH):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1))


masks = functools.partial(random_masks, N)


def tubes(batch=2, locations=7, seed=2):
    """Tube masks: the same spatial locations in every frame, different ones for each clip."""
    t, h, w = GRID
    generator = torch.Generator().manual_seed(seed)
    kept = torch.stack([torch.randperm(h * w, generator=generator)[:locations].sort().values for _ in range(batch)])
    return (torch.arange(t)[:, None] * (h * w) + kept[:, None]).flatten(1)


def masked_encoder(case):
    """The cached encoder, if it accepts masks."""
    if not encoder(case).accepts_masks:
        pytest.skip("does not accept masks")
    return encoder(case)


def test_all_files_with_factories_are_tested():
    assert {name for name, _ in CASES.values()} >= {"vit_tiny", "timesformer_tiny", "vivit_tiny", "r3d_18"}
    assert len(CASES) > 15


@every_encoder
@torch.no_grad()
def test_clips_of_other_sizes_give_the_tokens_of_their_grid(case):
    model = encoder(case)
    assert model.embed_dim % model.num_heads == 0
    for frames, height, width in ((6, 24, 56), (12, 40, 24)):
        t, h, w = model.grid_size(frames, height, width)
        tokens = model(clips(1, frames, height, width))
        assert tokens.shape == (1, t * h * w, model.embed_dim)
        assert tokens.isfinite().all()


@every_encoder
@torch.no_grad()
def test_clips_of_a_batch_are_independent(case):
    model, x = encoder(case), clips()
    torch.testing.assert_close(model(x[1:2]), model(x)[1:2], atol=1e-5, rtol=1e-4)
    if model.accepts_masks:
        keep = masks()
        torch.testing.assert_close(model(x[1:2], keep[1:2]), model(x, keep)[1:2], atol=1e-5, rtol=0)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_encoder
def test_every_parameter_receives_a_gradient(case):
    """In eval mode, because batch norm couples samples and stochastic depth drops them in training."""
    has_head = "num_classes" in accepted(case)
    model = build(case, **{"num_classes": 3} if has_head else {})
    for keep in (None, masks()) if model.accepts_masks else (None,):
        model.zero_grad()
        out = model(clips()) if keep is None else model(clips(), keep)
        if has_head:
            assert out.shape == (2, 3)
            F.cross_entropy(out, torch.tensor([0, 2])).backward()
        else:
            out.square().mean().backward()
        assert not [name for name, grad in gradients(model).items() if grad is None or not grad.abs().sum() > 0]
    # At most a few parameters may be frozen.
    assert sum(not parameter.requires_grad for parameter in model.parameters()) <= 4


@every_encoder
def test_bfloat16_is_close_to_fp32_and_its_loss_is_finite(case):
    model = build(case)
    with torch.no_grad():
        expected = model(clips())
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model(clips())
        loss = tokens.float().square().mean()
    assert (tokens.float() - expected).norm() < 0.1 * expected.norm()
    assert loss.isfinite()
    if model.accepts_masks:  # the others consist of 3D convolutions, whose bfloat16 gradients are up to torch
        loss.backward()
        assert not [name for name, grad in gradients(model).items() if grad is None or not grad.isfinite().all()]


@every_encoder
@torch.no_grad()
def test_saved_weights_give_the_same_tokens(case, tmp_path):
    if product(ENCODERS.find(CASES[case][0])).__module__ == "tubelet.models.pretrained":
        pytest.skip("weights files are tested in test_pretrained.py")
    model, other, x = encoder(case), build(case, seed=1), clips(1)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other(x), model(x))


@every_encoder
def test_activation_checkpointing_gives_the_same_gradients(case):
    if "use_activation_checkpointing" not in accepted(case):
        pytest.skip("has no such option")
    both = []
    for use_checkpointing in (False, True):
        model = build(case, use_activation_checkpointing=use_checkpointing).train()
        model(clips(), masks()).square().sum().backward()
        both.append(gradients(model))
    torch.testing.assert_close(*both)


@every_encoder
@torch.no_grad()
def test_keeping_all_tokens_in_any_order_gives_the_same_tokens(case):
    model, x, order = masked_encoder(case), clips(), masks(keep=N)
    torch.testing.assert_close(model(x, order), take(model(x), order), atol=2e-5, rtol=0)


@every_encoder
@torch.no_grad()
def test_dropped_patches_are_never_read(case):
    model, x, keep = masked_encoder(case), clips(), masks()
    dropped = torch.ones(2, N, dtype=torch.bool).scatter(1, keep, False).view(2, *GRID)
    pixels = dropped.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, None]
    tokens = model(x, keep)
    assert tokens.shape == (2, 17, model.embed_dim)
    torch.testing.assert_close(model(x.masked_fill(pixels, torch.nan), keep), tokens)


@every_encoder
@torch.no_grad()
def test_tube_masks_give_the_same_tokens(case, monkeypatch):
    """With `tube_masks` an encoder may fold its attention into the batch instead of masking it."""
    model, x, keep = masked_encoder(case), clips(), tubes()
    if not hasattr(model, "tube_masks"):
        pytest.skip("has no special case for tubes")
    masked, unmasked = model(x, keep), model(x)
    monkeypatch.setattr(model, "tube_masks", True)
    torch.testing.assert_close(model(x, keep), masked, atol=2e-5, rtol=0)
    assert torch.equal(model(x), unmasked)


@every_encoder
@torch.no_grad()
def test_a_list_of_masks_gives_a_list(case):
    model, x, both = masked_encoder(case), clips(), [masks(keep=5), masks(keep=12, seed=3)]
    for tokens, keep in zip(model(x, both), both, strict=True):
        torch.testing.assert_close(tokens, model(x, keep))
    if "num_classes" in accepted(case):
        model = build(case, num_classes=7)
        for logits, tokens, keep in zip(model(x, both), model.forward_features(x, both), both, strict=True):
            assert logits.shape == (2, 7)
            assert torch.equal(logits, model(x, keep))
            assert torch.equal(tokens, model.forward_features(x, keep))


@every_encoder
def test_pretraining_accepts_the_encoder_or_reports_that_it_takes_no_masks(case, tmp_path):
    name, chosen = CASES[case]
    even_heads = {"num_heads": 4} if chosen else {}
    raw = {
        "folder": str(tmp_path),
        "data": {"datasets": [str(tmp_path)], "crop_size": 64, "num_frames": 8, "sampling_rate": 2},
        "mask": [{}],
        "encoder": {"name": name, **even_heads, **chosen},
    }
    if encoder(case).accepts_masks:
        assert check(raw, Options, "file.yaml").encoder.name == name
        return
    for keep in (masks(), [masks()]):
        with pytest.raises(ValueError, match=f"{type(encoder(case)).__name__} .*takes no masks"):
            encoder(case)(clips(), keep)
    with pytest.raises(ConfigError, match=f"encoder.name: {name} needs all tokens"):
        check(raw, Options, "file.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, (_, chosen) in CASES.items() if not chosen])
@torch.no_grad()
def test_compiled_blocks_serve_any_number_of_tokens(case):
    """As `meta.compile` compiles them: equal tokens, and no graph after the second batch."""
    torch._dynamo.reset()
    counters.clear()
    model, x, graphs = masked_encoder(case), clips(), []
    compiled = build(case)
    compile_blocks(compiled, backend="eager")
    for keep in (17, 9, 13, 5):
        both = [masks(keep=keep), masks(keep=keep - 2, seed=3)]
        for tokens, expected in zip(compiled(x, both), model(x, both), strict=True):
            torch.testing.assert_close(tokens, expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[-1] <= 8


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, (_, chosen) in CASES.items() if not chosen])
@torch.no_grad()
def test_compiles_without_graph_breaks(case):
    """Encoders that accept masks must compile in one graph. Tracing suffices to find graph breaks."""
    masked_encoder(case)
    shallow = {"depth": 1} if "depth" in accepted(case) else {}
    model, x, keep = build(case, **shallow), clips(1), tubes(1)
    model.tube_masks = True
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, keep), model(x, keep))


@every_encoder
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 5}, "5 heads do not divide the width 48"),
        ({"crop_size": 36}, "crop_size 36 is not divisible by patch_size 8"),
        ({"num_frames": 5}, "num_frames 5 is not divisible by tubelet_size 2"),
        ({"no_such_argument": 1}, "no_such_argument"),
    ],
)
def test_invalid_arguments_raise(case, sizes, message):
    (name,) = ({"crop_size": "img_size"}.get(next(iter(sizes)), next(iter(sizes))),)
    if name not in accepted(case) and name != "no_such_argument":
        pytest.skip("has no such argument")
    with pytest.raises(ValueError, match=message):
        build(case, **sizes)


@every_encoder
def test_invalid_clips_raise(case):
    with pytest.raises(ValueError, match=r"takes clips \[B, (C|3), T, H, W\]"):
        encoder(case)(clips()[:, :, 0])
    if "patch_size" in accepted(case):
        for frames, height in ((5, HEIGHT), (FRAMES, 36)):
            with pytest.raises(ValueError, match="is not divisible by|cannot be cut into"):
                encoder(case)(clips(1, frames, height))
