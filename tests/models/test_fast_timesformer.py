import inspect
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.rotation import rotated
from tubelet.grid import ClipShape, Grid
from tubelet.layers.coordinates import locate
from tubelet.layers.groups import Groups
from tubelet.layers.mixing import MECHANISMS, orthogonal_features
from tubelet.layers.rope import RopeTables, axial_rope, rope_tables, rotate
from tubelet.models import build_encoder
from tubelet.models import fast_timesformer as zoo
from tubelet.models.fast_timesformer import (
    FastAttention,
    FastTimeSformer,
    PerformerAttention,
    RegularAttention,
)

TYPES = ("divided", "joint")
every_kind = pytest.mark.parametrize(
    ("mechanism", "attn_type"), [(mechanism, attn_type) for mechanism in MECHANISMS for attn_type in TYPES]
)


def small(**arguments):
    """A grid of 2 x 4 x 6 tokens."""
    torch.manual_seed(0)
    sizes = {"height": 32, "width": 48, "patch_size": 8, "tubelet_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return FastTimeSformer(4, 3, **{**sizes, "init_std": 0.2, **arguments}).eval()


def clips(batch=2, frames=4, height=32, width=48):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1))


def kept(total=48, keep=11, batch=2):
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(total, generator=generator)[:keep].sort().values for _ in range(batch)])


def random_tokens(*shape, seed=3, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_published_examples():
    model = FastTimeSformer(5, 3, 512, 512, num_classes=2, attn_mechanism="fastformer")
    with torch.no_grad():
        assert model(torch.randn(1, 5, 3, 512, 512)).shape == (1, 2)
    for layer in (FastAttention(dim=64), RegularAttention(dim=64), PerformerAttention(dim=64)):
        assert layer(torch.randn(16, 32, 64)).shape == (16, 32, 64)


def fastformer_loop(layer, x, rope):
    """Equations 3 to 6 of the paper with loops over clips, heads and tokens."""
    heads, d = layer.num_heads, layer.head_dim
    w_query, w_key = layer.qkv.weight.chunk(2)
    scores = lambda w, vectors: torch.stack([torch.exp(w @ vector / math.sqrt(d)) for vector in vectors])  # noqa: E731
    out = []
    for clip in x:
        u = []
        for head in range(heads):
            rows = slice(head * d, (head + 1) * d)
            values = [w_query[rows] @ token for token in clip]
            queries, keys = values, [w_key[rows] @ token for token in clip]
            if rope is not None:
                rotation = rope.rotation[0, :, 0, 0]
                queries, keys = ([rotated(*pair) for pair in zip(z, rotation, strict=True)] for z in (queries, keys))
            alpha = scores(layer.query_weight[head, 0], queries)
            global_query = sum(a * q for a, q in zip(alpha / alpha.sum(), queries, strict=True))
            products = [global_query * k for k in keys]
            beta = scores(layer.key_weight[head, 0], products)
            global_key = sum(b * p for b, p in zip(beta / beta.sum(), products, strict=True))
            u.append([global_key * value for value in values])
        for i, token in enumerate(clip):
            r = layer.proj(torch.cat([u[head][i] for head in range(heads)]))
            out.append(r + w_query @ token)
    return torch.stack(out).view(len(x), -1, heads * d)


@pytest.mark.parametrize("with_rope", [False, True])
def test_fastformer_equals_its_equations(with_rope):
    torch.manual_seed(0)
    layer = FastAttention(dim=24, num_heads=2).double()
    torch.nn.init.normal_(layer.qkv.weight)
    rope = None
    if with_rope:
        rope = rope_tables(12, (1, 3, 3)).map(torch.Tensor.double)
    x = random_tokens(2, 9, 24).double()
    expected = fastformer_loop(layer, x, rope)
    assert expected.std() > 0.1
    torch.testing.assert_close(layer(x, rope), expected, atol=1e-10, rtol=0)


def as_regular(performer):
    """Return softmax attention with the weights of the Performer layer."""
    regular = RegularAttention(performer.proj.in_features, performer.num_heads)
    regular.load_state_dict({name: value for name, value in performer.state_dict().items() if name != "features"})
    return regular


def test_performer_converges_to_softmax_attention():
    """The error decreases with the square root of the number of features, like that of any Monte Carlo mean.

    It is relative to the difference between softmax attention and the mean of the values.
    """
    torch.manual_seed(0)
    x, numbers, errors = random_tokens(2, 40, 32), (16, 64, 256, 1024, 4096), []
    reference = PerformerAttention(dim=32, num_heads=2)
    with torch.no_grad():
        reference.qkv.weight.mul_(0.7)
        expected = as_regular(reference)(x)
        mean_value = reference.proj(reference.qkv(x)[..., 64:].mean(dim=1, keepdim=True))
        for number in numbers:
            layer = PerformerAttention(dim=32, num_heads=2, num_features=number)
            layer.load_state_dict({**reference.state_dict(), "features": layer.features})
            draws = []
            for seed in range(4):
                layer.redraw_features(torch.Generator().manual_seed(seed))
                draws.append(((layer(x) - expected).norm() / (expected - mean_value).norm()).item())
            errors.append(sum(draws) / len(draws))
    print("\nfeatures  relative error")
    print("\n".join(f"{number:8d}  {error:.3f}" for number, error in zip(numbers, errors, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2
    assert 0.35 < math.log(errors[0] / errors[-1]) / math.log(numbers[-1] / numbers[0]) < 0.65


def performer_as_published(q, k, v, features):
    """Equation 4 with the features of lemma 1, without numerical stabilization; all arguments are [n, d]."""
    q, k = q * q.shape[-1] ** -0.25, k * k.shape[-1] ** -0.25
    phi = lambda x: torch.exp(x @ features.T - x.square().sum(dim=-1, keepdim=True) / 2)  # noqa: E731
    weights = phi(q) @ phi(k).T
    return weights / weights.sum(dim=-1, keepdim=True) @ v


def test_performer_equals_its_equation():
    torch.manual_seed(0)
    layer = PerformerAttention(dim=16, num_heads=2, num_features=20).double()
    q, k, v = (random_tokens(3, 2, 12, 8, seed=seed).double() for seed in range(3))
    expected = torch.stack(
        [
            torch.stack([performer_as_published(q[b, h], k[b, h], v[b, h], layer.features) for h in range(2)])
            for b in range(3)
        ]
    )
    torch.testing.assert_close(layer.mix(q, k, v, None), expected, atol=1e-10, rtol=0)


def test_performer_is_finite_where_exponentials_overflow():
    torch.manual_seed(0)
    layer = PerformerAttention(dim=16, num_heads=2)
    x = random_tokens(2, 30, 16, scale=100.0).requires_grad_()
    q, k, v = layer.project(x, None)
    assert not performer_as_published(q[0, :, 0], k[0, :, 0], v[0, :, 0], layer.features).isfinite().all()
    out = layer(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


def test_features_are_orthogonal_gaussians_and_can_be_redrawn():
    layer = PerformerAttention(dim=16, num_heads=1, num_features=40)
    for block in layer.features.split(16):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), atol=1e-4, rtol=0)
    many = orthogonal_features(16 * 2000, 16, torch.Generator().manual_seed(0))
    torch.testing.assert_close(many.T @ many / len(many), torch.eye(16), atol=0.05, rtol=0)
    assert many.square().sum(dim=1).var().item() == pytest.approx(2 * 16, rel=0.1)  # chi-squared

    before = layer.features.clone()
    layer.redraw_features(torch.Generator().manual_seed(5))
    once = layer.features.clone()
    layer.redraw_features(torch.Generator().manual_seed(5))
    assert torch.equal(layer.features, once)
    assert not torch.equal(before, once)

    model = small(attn_mechanism="performer")
    before = model(clips())
    model.redraw_features()
    assert not torch.equal(model(clips()), before)
    with pytest.raises(ValueError, match="redraw_features: only attn_mechanism performer"):
        small().redraw_features()


@pytest.mark.parametrize("mechanism", ["fastformer", "performer"])
def test_cost_is_linear_in_the_number_of_tokens(mechanism):
    layer = MECHANISMS[mechanism](32, 4).to("meta")

    def flops(tokens):
        with FlopCounterMode(display=False) as counter:
            layer(torch.empty(1, tokens, 32, device="meta"))
        return counter.get_total_flops()

    assert flops(1000) > 0
    assert flops(32000) == pytest.approx(32 * flops(1000), rel=0.01)


def test_axial_rope_equals_parts_of_a_wider_head():
    """`rope_tables` assigns a third of the channels to each axis; fewer axes give the tables of fewer channels."""
    grid, x = (2, 3, 5), random_tokens(1, 30, 2, 2, 24)
    t, y, w = locate(torch.arange(30)[None], grid)
    expected = rope_tables(24, grid)
    torch.testing.assert_close(rotate(x, axial_rope(24, (t, y, w))), rotate(x, expected))
    torch.testing.assert_close(rotate(x[..., :8], axial_rope(8, (t,))), rotate(x, expected)[..., :8])
    torch.testing.assert_close(rotate(x[..., 8:], axial_rope(16, (y, w))), rotate(x, expected)[..., 8:])


def test_groups_are_spatial_locations_or_frames():
    index = torch.arange(24.0).view(1, 24, 1, 1)  # 2 frames of 3 x 4
    time, space = Groups(Grid(2, 3, 4), "time"), Groups(Grid(2, 3, 4), "space")
    assert time.split(index)[:, 0, :, 0].tolist() == [[i, i + 12] for i in range(12)]
    assert space.split(index)[:, 0, :, 0].tolist() == [list(range(12)), list(range(12, 24))]
    for groups in (time, space):
        assert torch.equal(groups.merge(groups.split(index)), index)


def tokens_by_loop(model, video, keep):
    """The encoder with loops over clips and groups; only the kept tokens of a group take part in its attention."""
    grid = t, h, w = model.grid_size(*video.shape[2:])
    out = []
    for clip, indices in zip(video, keep, strict=True):
        x = model.patch_embed(clip[None])[:, indices]
        group_ids = {"time": indices % (h * w), "space": indices // (h * w), None: torch.zeros_like(indices)}
        for block in model.blocks:
            layout = model._layout(grid, indices[None], video.device)
            for norm, attention, (rope, groups) in zip(block.norms, block.attentions, layout, strict=True):
                mixed, group_id = torch.zeros_like(x), group_ids[groups and groups.axis]
                for group in group_id.unique():
                    members = group_id == group
                    mixed[:, members] = attention(norm(x[:, members]), RopeTables(rope.rotation[:, members]))
                x = x + mixed
            x = x + block.mlp(block.norm(x))
        out.append(model.norm(x))
    return torch.cat(out)


@every_kind
def test_kept_tokens_equal_a_loop_over_groups(mechanism, attn_type):
    model, video, keep = small(attn_mechanism=mechanism, attn_type=attn_type), clips(), kept()
    with torch.no_grad():
        expected = tokens_by_loop(model, video, keep)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(video, keep), expected, atol=2e-5, rtol=0)
        all_tokens = torch.arange(48).expand(2, -1)
        torch.testing.assert_close(model(video), tokens_by_loop(model, video, all_tokens), atol=2e-5, rtol=0)
        torch.testing.assert_close(model(video, all_tokens), model(video), atol=2e-5, rtol=0)
        first, second = model(video, [keep, all_tokens])
    assert first.shape == (2, 11, 32)
    assert second.shape == (2, 48, 32)


@every_kind
def test_clip_sizes_layouts_and_independence(mechanism, attn_type):
    model = small(attn_mechanism=mechanism, attn_type=attn_type)
    with torch.no_grad():
        assert model(clips(frames=10, height=24, width=8)).shape == (2, 5 * 3, 32)
        video = clips(batch=3)
        tokens = model(video)
        torch.testing.assert_close(model(video.transpose(1, 2)), tokens)
        torch.testing.assert_close(model(video[1:2]), tokens[1:2], atol=1e-5, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(video).isfinite().all()


def test_channels_come_first_if_both_layouts_match():
    model, video = small(tubelet_size=1), clips(frames=3)
    assert not model.patch_embed.frames_first(video)
    assert model.patch_embed.frames_first(clips(frames=4).transpose(1, 2))


def test_head_reads_the_mean_token():
    model, video, keep = small(num_classes=5), clips(), kept()
    torch.testing.assert_close(model(video), model.head(model.forward_features(video).mean(dim=1)))
    assert model.forward_features(video, keep).shape == (2, 11, 32)
    assert [logits.shape for logits in model(video, [keep, keep])] == [(2, 5)] * 2


def test_factories_build_from_the_configuration():
    for name in zoo.SIZES:
        sizes = inspect.signature(getattr(zoo, name)).parameters
        assert {"img_size", "num_frames", "patch_size", "tubelet_size"} <= set(sizes), name
    options = {"name": "fast_timesformer_tiny", "attn_mechanism": "performer"}
    encoder = build_encoder(options, ClipShape(4, (16, 32), 8, 2))
    assert encoder(torch.randn(1, 3, 4, 16, 32)).shape == (1, 16, 192)
    assert (encoder.embed_dim, encoder.num_heads, encoder.grid_size(4, 16, 32)) == (192, 3, (2, 2, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mechanism": "linear"}, "attn_mechanism 'linear': expected one of fastformer, performer, regular"),
        ({"attn_type": "space"}, "attn_type 'space': expected one of divided, joint"),
        ({"num_heads": 5}, "5 heads do not divide the width 32"),
        ({"num_heads": 16}, "at least 4, not 32 / 16; change num_heads"),
        ({"num_heads": 8, "attn_type": "joint"}, "at least 6, not 32 / 8; change num_heads"),
        ({"attn_drop_rate": 0.1}, "attn_drop_rate 0.1: fastformer has no attention weights"),
        ({"num_features": 64}, "num_features 64: fastformer has no random features"),
        ({"num_features": 0, "attn_mechanism": "performer"}, "num_features 0: Performer needs at least one"),
        ({"height": 33}, "crop_size 33x48 is not divisible by patch_size 8"),
        ({"img_size": (32, 20)}, "crop_size 32x20 is not divisible by patch_size 8"),
        ({"tubelet_size": 3}, "num_frames 4 is not divisible by tubelet_size 3"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_invalid_clips_raise():
    model = small()
    with pytest.raises(ValueError, match=r"takes clips \[B, 3, T, H, W\] or \[B, T, 3, H, W\].*set in_chans"):
        model(torch.randn(1, 4, 4, 32, 48))
    with pytest.raises(ValueError, match="crop_size 33x48"):
        model(torch.randn(1, 3, 4, 33, 48))
    with pytest.raises(ValueError, match="num_frames 5"):
        model(torch.randn(1, 3, 5, 32, 48))
