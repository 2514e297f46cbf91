import inspect

import pytest
import torch
import torch.nn.functional as F

from tubelet.grid import ClipShape
from tubelet.layers.coordinates import locate
from tubelet.layers.rope import axial_rope
from tubelet.models import build_encoder
from tubelet.models import generative_timesformer as zoo
from tubelet.models.generative_timesformer import GenerativeTimeSformer, TimeSformer


def small(**arguments):
    """A grid of 2 x 2 x 3 tokens, and 2 x 2 x 3 target tokens."""
    torch.manual_seed(0)
    sizes = {"img_size": (16, 24), "patch_size": 8, "num_frames": 4, "tubelet_size": 2, "out_chans": 1}
    widths = {"embed_dim": 32, "depth": 2, "num_heads": 4, "init_std": 0.2}
    return GenerativeTimeSformer(**{**sizes, **widths, **arguments}).eval()


def clips(batch=2, frames=4, height=16, width=24):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1))


def kept(total=12, keep=5, batch=2):
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(total, generator=generator)[:keep].sort().values for _ in range(batch)])


def test_published_example():
    """The published sizes, except for a smaller depth to save time."""
    model = TimeSformer(
        dim=512, image_size=224, patch_size=16, num_frames=8, num_target_frames=4, channels=3, out_channels=1,
        depth=1, heads=8, dim_head=64, attn_dropout=0.1, ff_dropout=0.1,
    )  # fmt: skip
    with torch.no_grad():
        assert model(torch.randn(1, 8, 3, 224, 224)).shape == (1, 4, 1, 224, 224)


def test_published_argument_names_build_the_same_model():
    published = TimeSformer(dim=32, num_frames=4, image_size=16, patch_size=8, heads=2, dim_head=24, depth=2).eval()
    model = GenerativeTimeSformer(
        img_size=16, patch_size=8, num_frames=4, embed_dim=32, depth=2, num_heads=2, head_dim=24
    ).eval()
    model.load_state_dict(published.state_dict())
    video = clips(width=16)
    torch.testing.assert_close(published(video), model(video))


def cut(frames, tubelet, patch):
    """Cut frames [C, T, H, W] into patches in time-major order."""
    _, T, H, W = frames.shape
    return torch.stack(
        [
            frames[:, t : t + tubelet, y : y + patch, x : x + patch].flatten()
            for t in range(0, T, tubelet)
            for y in range(0, H, patch)
            for x in range(0, W, patch)
        ]
    )


class ConstantDecoder(torch.nn.Module):
    """A decoder that returns given patches."""

    def __init__(self, patches):
        super().__init__()
        self.patches = patches

    def forward(self, tokens):
        assert tokens.shape[:2] == self.patches.shape[:2]
        return self.patches


@pytest.mark.parametrize("frames_first", [False, True])
def test_predicted_patches_are_at_their_positions(frames_first):
    model, future = small(), torch.randn(2, 1, 4, 16, 24)
    model.to_pixels = ConstantDecoder(torch.stack([cut(frames, 2, 8) for frames in future]))
    video = clips(frames=4)
    if frames_first:
        video, future = video.transpose(1, 2), future.transpose(1, 2)
    assert torch.equal(model(video), future)


def test_unpatchify_inverts_patchify():
    model, video = small(embed_dim=3 * 2 * 8 * 8), clips()
    with torch.no_grad():
        model.patch_embed.proj.weight.copy_(torch.eye(384).view(384, 3, 2, 8, 8))
        model.patch_embed.proj.bias.zero_()
        patches = model.patch_embed(video)
    torch.testing.assert_close(model.unpatchify(patches, (2, 2, 3)), video)


def dense_frames(model, video, keep):
    """One masked attention over all tokens: clip tokens attend to their location or frame, targets to everything."""
    t, h, w = model.grid_size(*video.shape[2:])
    target_length = model.target_length
    index = torch.cat([keep, torch.arange(t * h * w, (t + target_length) * h * w).expand(len(keep), -1)], dim=1)
    is_target = index >= t * h * w
    positions = model._positions((t, h, w))
    rope = axial_rope(model.head_dim, locate(index, (t, h, w))) if model.use_rope else None
    x = torch.zeros(*index.shape, model.embed_dim)
    for b in range(len(video)):
        for i, token in enumerate(index[b].tolist()):
            patches = model.patch_embed(video[b : b + 1])[0]
            if is_target[b, i]:
                last = (t - 1) * h * w + token % (h * w)  # the same location at the last temporal index
                content = model.target_token + (patches[last] if last in keep[b] else 0)
            else:
                content = patches[token]
            x[b, i] = content + positions[token]
    for block in model.blocks:
        for norm, attention, group in zip(
            block.norms, block.attentions, (index % (h * w), index // (h * w)), strict=True
        ):
            same = (group[:, :, None] == group[:, None, :]) & ~is_target[:, None, :]
            allowed = same | is_target[:, :, None]
            q, k, v = (part.transpose(1, 2) for part in attention.project(norm(x), rope))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
            x = x + attention.proj(y.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm(x))
    return model.norm(x)


@pytest.mark.parametrize("keep", [torch.arange(12).expand(2, -1), kept()], ids=["all", "some"])
@pytest.mark.parametrize("use_rope", [False, True])
def test_equals_one_masked_attention_over_all_tokens(keep, use_rope):
    model, video, K = small(use_rope=use_rope), clips(), keep.shape[1]
    with torch.no_grad():
        tokens = dense_frames(model, video, keep)
        assert tokens.std() > 0.1
        frames = model.unpatchify(model.to_pixels(tokens[:, K:]), (2, 2, 3))
        torch.testing.assert_close(model(video, keep), frames, atol=2e-5, rtol=0)
        torch.testing.assert_close(model.forward_features(video, keep), tokens[:, :K], atol=2e-5, rtol=0)
        if K == 12:
            torch.testing.assert_close(model(video), frames, atol=2e-5, rtol=0)


def test_every_predicted_patch_depends_on_every_input_patch():
    model, video = small(depth=1), clips(batch=1).requires_grad_()
    frames = model(video)
    for t, y, x in ((0, 0, 0), (3, 15, 23)):
        (gradient,) = torch.autograd.grad(frames[0, 0, t, y, x], video, retain_graph=True)
        assert (cut(gradient[0], 2, 8).abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("arguments", [{}, {"num_target_frames": 0, "num_classes": 3}], ids=["frames", "classes"])
def test_every_parameter_receives_a_gradient(arguments):
    model = small(depth=3, **arguments).train()
    model(clips()).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_without_target_frames_it_is_an_encoder():
    generator, encoder = small(), small(num_target_frames=0)
    shared = {name: value for name, value in generator.state_dict().items() if name in encoder.state_dict()}
    encoder.load_state_dict(shared)
    video, keep = clips(), kept()
    torch.testing.assert_close(encoder(video), generator.forward_features(video))
    torch.testing.assert_close(encoder(video, keep), encoder.forward_features(video, keep))
    assert [tokens.shape for tokens in encoder(video, [keep, keep[:, :2]])] == [(2, 5, 32), (2, 2, 32)]
    classifier = small(num_target_frames=0, num_classes=3)
    torch.testing.assert_close(classifier(video), classifier.head(classifier.forward_features(video).mean(dim=1)))


def test_clip_sizes_and_independence():
    model = small()
    with torch.no_grad():
        assert model(clips(frames=6, height=24, width=8)).shape == (2, 1, 4, 24, 8)
        assert model.forward_features(clips(frames=6, height=24, width=8)).shape == (2, 9, 32)
        frames = model(clips(batch=3))
        torch.testing.assert_close(model(clips(batch=3)[1:2]), frames[1:2], atol=1e-5, rtol=0)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(clips()).isfinite().all()


def test_save_and_load(tmp_path):
    model = small()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = small(init_std=0.01)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    torch.testing.assert_close(other(clips()), model(clips()))


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    model = small(depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(clips(), kept()), model(clips(), kept()))


def test_factories_build_from_the_configuration():
    for name in zoo.SIZES:
        sizes = inspect.signature(getattr(zoo, name)).parameters
        assert {"img_size", "num_frames", "patch_size", "tubelet_size"} <= set(sizes), name
    encoder = build_encoder("generative_timesformer_tiny", ClipShape(4, 16, 8, 2))
    assert encoder(clips(width=16)).shape == (2, 8, 192)
    generator = build_encoder({"name": "generative_timesformer_tiny", "num_target_frames": 2}, ClipShape(4, 16, 8, 2))
    assert generator(clips(width=16)).shape == (2, 3, 2, 16, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_target_frames": 3}, "num_target_frames 3 cannot be cut into tubelets of 2"),
        ({"num_target_frames": -2}, "num_target_frames -2"),
        ({"num_classes": 3}, "num_classes 3 and num_target_frames 4.*set one of them to 0"),
        ({"num_heads": 8, "use_rope": True}, "at least 6, not 4; change num_heads"),
        ({"num_heads": 5}, "5 heads do not divide the width 32"),
        ({"img_size": 20}, "crop_size 20 is not divisible by patch_size 8"),
        ({"num_frames": 5}, "num_frames 5 is not divisible by tubelet_size 2"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_invalid_clips_raise():
    with pytest.raises(ValueError, match=r"takes clips \[B, 3, T, H, W\] or \[B, T, 3, H, W\]"):
        small()(torch.randn(1, 4, 4, 16, 24))
