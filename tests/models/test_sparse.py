import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from tests.models.tokens import random_masks, take
from tests.rotation import rotated
from tubelet.grid import ClipShape
from tubelet.layers.block_attention import block_mask
from tubelet.layers.pattern_attention import boolean_mask
from tubelet.layers.patterns import (
    Lookahead,
    Lookback,
    SpatialStride,
    SpatialWindow,
    TemporalStride,
    TemporalWindow,
    Window,
    parse_pattern,
)
from tubelet.models import build_encoder
from tubelet.models.fastback import BTTransformer
from tubelet.models.multiscale import MultiscaleTransformer
from tubelet.models.sparse import SparseTransformer
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.models.windowed import WindowedTransformer

SMALL = {"img_size": (32, 40), "patch_size": 8, "num_frames": 8, "embed_dim": 48, "depth": 3, "num_heads": 2}
GRID = (4, 4, 5)
ENCODERS = {
    "sparse": functools.partial(SparseTransformer, **SMALL),
    "sparse_rope": functools.partial(SparseTransformer, **SMALL, use_rope=True),
    "windowed": functools.partial(WindowedTransformer, **SMALL, window_size=(2, 3, 3)),
    "fastback": functools.partial(BTTransformer, **SMALL),
    "multiscale": functools.partial(
        MultiscaleTransformer, **SMALL, fast_embed_dim=24, fast_num_heads=3, frame_stride=2, lateral_every=2
    ),
}
# Reference predicates on integers: (time, row, column) of query and key.
REFERENCE = {
    TemporalWindow(1): lambda q, k: abs(q[0] - k[0]) <= 1,
    TemporalStride(2): lambda q, k: abs(q[0] - k[0]) in (0, 2),
    SpatialWindow(1): lambda q, k: max(abs(q[1] - k[1]), abs(q[2] - k[2])) <= 1,
    SpatialStride(2): lambda q, k: abs(q[1] - k[1]) in (0, 2) and abs(q[2] - k[2]) in (0, 2, 4),
    Window((2, 3, 3)): lambda q, k: all(a // n == b // n for a, b, n in zip(q, k, (2, 3, 3), strict=True)),
    # Borders before index 1 and 3 in time, before 1 and 4 in space.
    Window((2, 3, 3), (1, 1, 1)): lambda q, k: (
        sum(q[0] >= b for b in (1, 3)) == sum(k[0] >= b for b in (1, 3))
        and all(sum(q[a] >= b for b in (1, 4)) == sum(k[a] >= b for b in (1, 4)) for a in (1, 2))
    ),
    Lookback(): lambda q, k: k[0] <= q[0],
    Lookahead(): lambda q, k: k[0] >= q[0],
}


def small(name, **arguments):
    torch.manual_seed(0)
    model = ENCODERS[name](**{"init_std": 0.1, **arguments}).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def clips(batch=2, frames=8, height=32, width=40):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1))


masks = functools.partial(random_masks, 80)


def loop(predicate, grid=GRID):
    tokens = list(itertools.product(*map(range, grid)))
    return torch.tensor([[bool(predicate(q, k)) for k in tokens] for q in tokens])


def all_tokens_under(model, x, allowed, keep=None):
    """All tokens pass the blocks; block l attends to kept tokens where allowed[l] [N, N] is True."""
    y = model.positions.add(model.patch_embed(x))
    rope = model.positions.rope()
    kept = torch.ones(y.shape[:2]) if keep is None else torch.zeros(y.shape[:2]).scatter(1, keep, 1.0)
    for block, mask in zip(model.blocks, allowed, strict=True):
        q, k, v = block.attn.qkv(block.norm1(y)).unflatten(2, (3, 2, 24)).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = (rotated(z, rope.rotation[:, :, 0].transpose(1, 2)) for z in (q, k))
        weights = (q @ k.mT * 24**-0.5).exp() * mask * kept[:, None, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        y = y + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        y = y + block.mlp(block.norm2(y))
    y = model.norm(y)
    return y if keep is None else take(y, keep)


@pytest.mark.parametrize("pattern", REFERENCE, ids=str)
def test_pattern_equals_a_loop(pattern):
    assert torch.equal(boolean_mask((pattern,), GRID)[0, 0], loop(REFERENCE[pattern]))
    keep = masks()
    kept = boolean_mask((pattern,), GRID, keep)[:, 0]
    assert torch.equal(kept, loop(REFERENCE[pattern])[keep[:, :, None], keep[:, None, :]])


@pytest.mark.parametrize("grid", [(1, 2, 3), (3, 1, 7), (5, 4, 2)])
def test_a_token_attends_to_itself_under_any_pattern(grid):
    for pattern in [*REFERENCE, TemporalWindow(0) & SpatialStride(3), Lookback() | Window((2, 2, 2))]:
        assert boolean_mask((pattern,), grid)[0, 0].diagonal().all()


@pytest.mark.parametrize(
    "heads",
    [
        (TemporalWindow(1) & SpatialStride(2) | SpatialWindow(0),),
        (Window((2, 3, 3), (1, 1, 1)),),
        (Lookback(), Lookahead(), Lookahead(), TemporalStride(2)),
    ],
    ids=["sparse", "windowed", "per head"],
)
def test_flex_attention_gives_the_same_numbers(heads):
    q, k, v = torch.randn(3, 2, 4, 80, 8)
    mask = block_mask(heads, GRID, 16, q.device)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=boolean_mask(heads, GRID))
    torch.testing.assert_close(flex_attention(q, k, v, block_mask=mask), expected, atol=1e-5, rtol=0)


def test_block_mask_skips_empty_blocks():
    heads = (Lookback(), Lookahead())
    blocks = boolean_mask(heads, (4, 4, 4))[0].unflatten(2, (4, 16)).unflatten(1, (4, 16)).any(4).any(2)
    assert torch.equal(block_mask(heads, (4, 4, 4), 16, torch.device("cpu")).to_dense()[0].bool(), blocks)
    assert blocks.float().mean() == 10 / 16


def test_patterns_are_parsed_from_text():
    text = "TemporalWindow(1) & SpatialStride(2) | Window((2, 3, 3), (1, 1, 1)) & Lookback()"
    expected = TemporalWindow(1) & SpatialStride(2) | Window((2, 3, 3), (1, 1, 1)) & Lookback()
    assert parse_pattern(text) == expected
    assert hash(parse_pattern("Window([2, 3, 3], [1, 1, 1])")) == hash(Window((2, 3, 3), (1, 1, 1)))
    a, b, c = (loop(REFERENCE[p]) for p in (TemporalWindow(1), SpatialStride(2), Lookback()))
    mask = boolean_mask((parse_pattern("TemporalWindow(1) & (SpatialStride(2) | Lookback())"),), GRID)
    assert torch.equal(mask[0, 0], a & (b | c))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TemporalWindo(1)", "is not one of TemporalWindow, .*SpatialStride"),
        ("TemporalWindow(1) + Lookback()", "combined with & and"),
        ("TemporalWindow()", "pattern 'TemporalWindow.*radius"),
        ("TemporalWindow(-1)", "radius -1 must be an integer, at least 0"),
        ("SpatialStride(0)", "stride 0 must be an integer, at least 1"),
        ("TemporalStride(1.5)", "stride 1.5 must be an integer"),
        ("TemporalWindow(1", "pattern 'TemporalWindow"),
        ("Window((2, 0, 3))", "each at least 1"),
        ("Window((2, 2, 2), (0, 2, 0))", "from 0 to less than the size"),
        ("__import__('os').getcwd()", "is not one of"),
    ],
)
def test_invalid_patterns_raise(text, message):
    with pytest.raises(ValueError, match=message):
        SparseTransformer(**SMALL, patterns=[text])


@pytest.mark.parametrize("name", ["sparse", "sparse_rope"])
@pytest.mark.parametrize("masked", [False, True])
def test_sparse_equals_dense_attention_with_a_mask(name, masked):
    """The default patterns: local in time; strided in time and space, plus the same location; local again."""
    local = loop(REFERENCE[TemporalWindow(1)])
    strided = loop(REFERENCE[TemporalStride(2)]) & loop(REFERENCE[SpatialStride(2)])
    strided |= loop(lambda q, k: q[1:] == k[1:])
    model, x, keep = small(name), clips(), masks() if masked else None
    expected = all_tokens_under(model, x, [local, strided, local], keep)
    torch.testing.assert_close(model(x, keep), expected, atol=2e-5, rtol=0)
    assert (expected - all_tokens_under(model, x, [torch.ones(80, 80)] * 3, keep)).abs().max() > 0.01


def test_a_pattern_that_allows_everything_equals_a_vision_transformer():
    model, x, keep = small("sparse", patterns=["TemporalWindow(9)"]), clips(), masks()
    vit = VisionTransformer(**SMALL, norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6)).eval()
    vit.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), vit(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x, keep), vit(x, keep), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ENCODERS)
def test_dropout_is_active_only_in_training(name):
    model, x = small(name, drop_rate=0.5), clips()
    assert torch.equal(model(x), model(x))
    assert torch.equal(model(x), small(name)(x))
    model.train()
    assert not torch.allclose(model(x), model(x))


@pytest.mark.parametrize("file", ["sparse", "windowed", "fastback", "multiscale"])
def test_configuration_builds_every_factory(file):
    for name in (f"{file}_{size}" for size in ("tiny", "small", "base")):
        with torch.device("meta"):
            model = build_encoder({"name": name, "module": file, "num_classes": 5}, ClipShape(8, 64))
        assert model.grid == (4, 4, 4)
        assert model.head.out_features == 5
        assert model.embed_dim == {"tiny": 192, "small": 384, "base": 768}[name.split("_")[1]]


@pytest.mark.parametrize("wrong", ["TemporalWindow(1)", []])
def test_patterns_must_be_a_list(wrong):
    with pytest.raises(ValueError, match="expected a list of at least one pattern"):
        small("sparse", patterns=wrong)
