"""The contract of encoders; a new file in tubelet/models is met here the moment it is added.

Each class is built small, by its file's first factory, once for each value of its options with named choices.
"""

import functools
import inspect
import math
from typing import Literal, get_args, get_origin

import pytest
import torch
import torch.nn.functional as F

from app.vjepa.options import Options
from tubelet.config import ConfigError, check
from tubelet.config import registry as plugins
from tubelet.models import ModelConfig, build_encoder, factories

FRAMES, HEIGHT, WIDTH, GRID = 8, 32, 40, (4, 4, 5)
N = math.prod(GRID)
# What of this a factory accepts makes it small, with windows and exchanges of paths that matter on the small grid.
SMALL = {
    "depth": 2, "embed_dim": 48, "num_heads": 4, "window_size": (2, 3, 3), "fast_embed_dim": 24, "frame_stride": 2,
    "lateral_every": 1, "head_dim": 12,
}  # fmt: skip


def find_cases():
    cases = {}
    for file in plugins.available("models"):
        of_classes = {}
        for name, factory in factories(file).items():
            of_classes.setdefault(getattr(factory, "func", name), name)
        for name in of_classes.values():
            parameters = inspect.signature(factories(file)[name]).parameters
            cases[f"{name}"] = (file, name, {})
            for option, parameter in parameters.items():
                if get_origin(parameter.annotation) is Literal and option not in ModelConfig.model_fields:
                    for choice in set(get_args(parameter.annotation)) - {parameter.default}:
                        cases[f"{name}-{choice}"] = (file, name, {option: choice})
    return dict(sorted(cases.items()))


CASES = find_cases()
every_encoder = pytest.mark.parametrize("case", CASES)


def accepted(case):
    file, name, _ = CASES[case]
    return inspect.signature(factories(file)[name]).parameters


def build(case, seed=0, *, crop_size=(HEIGHT, WIDTH), num_frames=FRAMES, **arguments):
    file, name, chosen = CASES[case]
    small = {option: value for option, value in SMALL.items() if option in accepted(case)}
    if "num_heads" in small:  # which says the heads' width
        small.pop("head_dim", None)
    in_section = {option: arguments.pop(option) for option in list(arguments) if option in ModelConfig.model_fields}
    model = ModelConfig(encoder=file, model_name=name, encoder_args={**small, **chosen, **arguments}, **in_section)
    torch.manual_seed(seed)
    return build_encoder(model, crop_size=crop_size, num_frames=num_frames, patch_size=8, tubelet_size=2).eval()


@functools.cache
def encoder(case):
    """Shared by the tests that change nothing in it."""
    return build(case)


def clips(batch=2, frames=FRAMES, height=HEIGHT, width=WIDTH):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1))


def masks(batch=2, keep=17, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(N, generator=generator)[:keep] for _ in range(batch)])


def tubes(batch=2, columns=7, seed=2):
    """The same columns in every time slot, others in each clip."""
    t, h, w = GRID
    generator = torch.Generator().manual_seed(seed)
    kept = torch.stack([torch.randperm(h * w, generator=generator)[:columns].sort().values for _ in range(batch)])
    return (torch.arange(t)[:, None] * (h * w) + kept[:, None]).flatten(1)


def take(tokens, indices):
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def with_masks(case):
    if not encoder(case).accepts_masks:
        pytest.skip("takes no masks")
    return encoder(case)


def test_all_files_with_factories_are_met():
    assert {file for file, _, _ in CASES.values()} >= {"vision_transformer", "timesformer", "vivit", "pretrained"}
    assert len(CASES) > 15


@every_encoder
@torch.no_grad()
def test_tokens_of_any_length_and_size_fill_the_grid(case):
    model = encoder(case)
    assert model.embed_dim % model.num_heads == 0
    for frames, height, width in ((6, 24, 56), (12, 40, 24)):
        t, h, w = model.grid_size(frames, height, width)
        tokens = model(clips(1, frames, height, width))
        assert tokens.shape == (1, t * h * w, model.embed_dim)
        assert tokens.isfinite().all()


@every_encoder
@torch.no_grad()
def test_clips_of_a_batch_do_not_touch(case):
    model, x = encoder(case), clips()
    torch.testing.assert_close(model(x[1:2]), model(x)[1:2], atol=1e-5, rtol=1e-4)
    if model.accepts_masks:
        keep = masks()
        torch.testing.assert_close(model(x[1:2], keep[1:2]), model(x, keep)[1:2], atol=1e-5, rtol=0)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


@every_encoder
def test_gradient_reaches_every_parameter(case):
    """In eval mode: batch norm and stochastic depth tie or drop samples in training."""
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
    # Frozen parameters are no way to pass: a handful at most.
    assert sum(not parameter.requires_grad for parameter in model.parameters()) <= 4


@every_encoder
def test_bfloat16_is_close_and_its_loss_is_finite(case):
    model = build(case)
    with torch.no_grad():
        exact = model(clips())
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model(clips())
        loss = tokens.float().square().mean()
    assert (tokens.float() - exact).norm() < 0.1 * exact.norm()
    assert loss.isfinite()
    if model.accepts_masks:  # the others are made of 3D convolutions, whose bfloat16 gradients torch has to vouch for
        loss.backward()
        assert not [name for name, grad in gradients(model).items() if grad is None or not grad.isfinite().all()]


@every_encoder
@torch.no_grad()
def test_saved_weights_give_the_same_tokens(case, tmp_path):
    if CASES[case][0] == "pretrained":
        pytest.skip("reading weights from files is tested with the libraries")
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
    for saving in (False, True):
        model = build(case, use_activation_checkpointing=saving).train()
        model(clips(), masks()).square().sum().backward()
        both.append(gradients(model))
    torch.testing.assert_close(*both)


@every_encoder
@torch.no_grad()
def test_keeping_all_tokens_in_any_order_changes_nothing(case):
    model, x, order = with_masks(case), clips(), masks(keep=N)
    torch.testing.assert_close(model(x, order), take(model(x), order), atol=2e-5, rtol=0)


@every_encoder
@torch.no_grad()
def test_dropped_patches_are_never_read(case):
    model, x, keep = with_masks(case), clips(), masks()
    dropped = torch.ones(2, N, dtype=torch.bool).scatter(1, keep, False).view(2, *GRID)
    pixels = dropped.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, None]
    tokens = model(x, keep)
    assert tokens.shape == (2, 17, model.embed_dim)
    torch.testing.assert_close(model(x.masked_fill(pixels, torch.nan), keep), tokens)


@every_encoder
@torch.no_grad()
def test_tubes_fold_to_the_same_numbers(case, monkeypatch):
    """Where all masks are tubes an encoder may fold its attention; without that knowledge it masks it."""
    model, x, keep = with_masks(case), clips(), tubes()
    if not hasattr(model, "tube_masks"):
        pytest.skip("does the same for all masks")
    masked, whole = model(x, keep), model(x)
    monkeypatch.setattr(model, "tube_masks", True)
    torch.testing.assert_close(model(x, keep), masked, atol=2e-5, rtol=0)
    assert torch.equal(model(x), whole)


@every_encoder
@torch.no_grad()
def test_lists_of_masks_give_lists(case):
    model, x, both = with_masks(case), clips(), [masks(keep=5), masks(keep=12, seed=3)]
    for tokens, keep in zip(model(x, both), both, strict=True):
        assert torch.equal(tokens, model(x, keep))
    if "num_classes" in accepted(case):
        model = build(case, num_classes=7)
        for logits, tokens, keep in zip(model(x, both), model.forward_features(x, both), both, strict=True):
            assert logits.shape == (2, 7)
            assert torch.equal(logits, model(x, keep))
            assert torch.equal(tokens, model.forward_features(x, keep))


@every_encoder
def test_pretraining_takes_it_or_says_which_encoder_takes_no_masks(case, tmp_path):
    file, name, chosen = CASES[case]
    even_heads = {"num_heads": 4} if chosen else {}
    raw = {
        "folder": str(tmp_path),
        "data": {"datasets": [str(tmp_path)], "crop_size": 64, "num_frames": 8, "sampling_rate": 2},
        "mask": [{}],
        "model": {"encoder": file, "model_name": name, "encoder_args": {**even_heads, **chosen}},
    }
    if encoder(case).accepts_masks:
        assert check(raw, Options, "file.yaml").model.encoder == file
        return
    for keep in (masks(), [masks()]):
        with pytest.raises(ValueError, match=f"{type(encoder(case)).__name__} .*takes no masks"):
            encoder(case)(clips(), keep)
    with pytest.raises(ConfigError, match=f"model.encoder: {name} of {file} needs all tokens"):
        check(raw, Options, "file.yaml")


@pytest.mark.parametrize("case", [case for case, (_, _, chosen) in CASES.items() if not chosen])
@torch.no_grad()
def test_compiles_without_graph_breaks(case):
    """Those that accept masks claim it; traced only, which is where graphs break."""
    with_masks(case)
    model, x, keep = build(case, depth=1), clips(1), tubes(1)
    model.tube_masks = True
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, keep), model(x, keep))


@every_encoder
@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 5}, "5 heads do not divide the width 48"),
        ({"crop_size": 36}, "cannot be cut into patches of 8"),
        ({"num_frames": 5}, "cannot be cut into tubelets of 2"),
        ({"no_such_argument": 1}, "has no such argument"),
    ],
)
def test_arguments_that_cannot_be_are_refused(case, sizes, message):
    (name,) = ({"crop_size": "img_size"}.get(next(iter(sizes)), next(iter(sizes))),)
    if name not in accepted(case) and name != "no_such_argument":
        pytest.skip("has no such argument")
    with pytest.raises(ValueError, match=message):
        build(case, **sizes)


@every_encoder
def test_clips_that_do_not_fit_are_refused(case):
    with pytest.raises(ValueError, match=r"takes clips \[B, (C|3), T, H, W\]"):
        encoder(case)(clips()[:, :, 0])
    if "patch_size" in accepted(case):
        for frames, height in ((5, HEIGHT), (FRAMES, 36)):
            with pytest.raises(ValueError, match="cannot be cut into"):
                encoder(case)(clips(1, frames, height))
