import pytest
import torch
from torch import nn

from tubelet.models.fastback import (
    AddCLSFrames,
    BidirectionalTemporalAttention,
    BTTransformer,
    BTTransformerBlock,
    CLSPooling,
)

FRAMES, PATCHES, WIDTH = 5, 6, 24


def attention(lookback_heads=1, lookahead_heads=2):
    torch.manual_seed(0)
    layer = BidirectionalTemporalAttention(
        WIDTH, lookback_heads + lookahead_heads, lookback_heads, lookahead_heads, PATCHES
    )
    return layer.eval()


def frames(batch=2, number=FRAMES):
    return torch.randn(batch, number, PATCHES, WIDTH, generator=torch.Generator().manual_seed(1))


def heads_of(layer, x):
    """Return the outputs of the individual heads, [B, F, P, heads, d]."""
    layer.proj = nn.Identity()
    return layer(x).unflatten(3, (layer.num_heads, layer.head_dim))


def encoder(**arguments):
    torch.manual_seed(0)
    sizes = {"img_size": (16, 24), "patch_size": 8, "num_frames": 8, "embed_dim": 48, "depth": 3, "num_heads": 4}
    model = BTTransformer(**{**sizes, "init_std": 0.1, **arguments}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def clips():
    return torch.randn(2, 3, 8, 16, 24, generator=torch.Generator().manual_seed(1))


def test_published_example():
    x = torch.randn(8, 16, 64, 128)
    x = AddCLSFrames(embed_dim=128, frame_size=64)(x)
    assert x.shape == (8, 18, 64, 128)
    x = BTTransformerBlock(
        embed_dim=128,
        num_heads=8,
        lookback_heads=4,
        lookahead_heads=4,
        frame_size=64,
        ff_hidden_dim=512,
        block_size=128,
        dropout=0.1,
    )(x)
    assert x.shape == (8, 18, 64, 128)
    assert CLSPooling(embed_dim=128)(x).shape == (8, 128)


@pytest.mark.parametrize(("lookback", "lookahead"), [(1, 2), (2, 2), (3, 0), (0, 3)])
def test_heads_equal_a_loop_over_frames(lookback, lookahead):
    """Each frame attends, without a mask, to the part of the clip that ends or begins with it."""
    layer, x = attention(lookback, lookahead), frames()
    q, k, v = layer.qkv(x).unflatten(3, (3, layer.num_heads, layer.head_dim)).unbind(3)  # [B, F, P, heads, d]
    expected = torch.empty_like(q)
    for head in range(layer.num_heads):
        for frame in range(FRAMES):
            visible = slice(0, frame + 1) if head < lookback else slice(frame, FRAMES)
            keys, values = (part[:, visible, :, head].flatten(1, 2) for part in (k, v))
            weights = (q[:, frame, :, head] @ keys.mT / layer.head_dim**0.5).softmax(-1)
            expected[:, frame, :, head] = weights @ values
    torch.testing.assert_close(layer(x), layer.proj(expected.flatten(3)), atol=1e-5, rtol=0)
    torch.testing.assert_close(heads_of(layer, x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changed", range(FRAMES))
def test_a_frame_affects_later_lookback_and_earlier_lookahead_outputs(changed):
    layer, x = attention(), frames()
    other = x.clone()
    other[:, changed, 2] += 1.0
    change = (heads_of(layer, other) - heads_of(layer, x)).abs().amax((2, 4))  # [B, F, heads]
    for frame in range(FRAMES):
        assert (change[:, frame, 0] > 0).all() if frame >= changed else (change[:, frame, 0] == 0).all()
        assert (change[:, frame, 1:] > 0).all() if frame <= changed else (change[:, frame, 1:] == 0).all()


def test_a_single_frame_equals_multihead_attention():
    layer, x = attention(), frames(number=1)
    reference = nn.MultiheadAttention(WIDTH, 3, batch_first=True)
    reference.in_proj_weight.data.copy_(layer.qkv.weight)
    reference.in_proj_bias.data.copy_(layer.qkv.bias)
    reference.out_proj.load_state_dict(layer.proj.state_dict())
    torch.testing.assert_close(layer(x)[:, 0], reference(x[:, 0], x[:, 0], x[:, 0])[0], atol=1e-5, rtol=0)


def test_cls_frames_are_first_and_last():
    add, x = AddCLSFrames(WIDTH, PATCHES), frames()
    y = add(x)
    assert torch.equal(y[:, 1:-1], x)
    assert torch.equal(y[:, 0], add.frames[0].expand_as(y[:, 0]))
    assert torch.equal(y[:, -1], add.frames[1].expand_as(y[:, 0]))
    assert not torch.equal(y[:, 0], y[:, -1])


def test_cls_pooling_reads_the_mean_of_the_first_and_last_frame():
    pool, x = CLSPooling(WIDTH), frames()
    both = torch.stack([torch.cat([clip[0].mean(0), clip[-1].mean(0)]) for clip in x])
    torch.testing.assert_close(pool(x), pool.proj(both))
    other = x.clone()
    other[:, 1:-1] += 1.0
    assert torch.equal(pool(x), pool(other))


def test_encoder_equals_its_layers_in_sequence():
    """Tokens and logits equal the public layers applied to frames [B, F, P, D]."""
    model, x = encoder(num_classes=3), clips()
    y = model.positions.add(model.patch_embed(x)).unflatten(1, (4, 6))
    y = model.cls_frames(y)
    for block in model.blocks:
        y = block(y)
    y = model.norm(y)
    torch.testing.assert_close(model.forward_features(x), y[:, 1:-1].flatten(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(model(x), model.head(model.pool(y)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lookback", [1, 2, 4])
def test_kept_tokens_equal_all_tokens_under_masks(lookback):
    """All tokens pass the blocks; keys are the kept tokens and the CLS frames, restricted by their frame."""
    model, x = encoder(lookback_heads=lookback, num_classes=3), clips()
    keep = torch.stack([torch.randperm(24, generator=torch.Generator().manual_seed(s))[:9] for s in (3, 4)])
    kept = torch.cat([torch.ones(2, 6), torch.zeros(2, 24).scatter(1, keep, 1.0), torch.ones(2, 6)], dim=1)
    time = torch.arange(6).repeat_interleave(6)
    back, ahead = time[:, None] >= time, time[:, None] <= time
    allowed = torch.stack([back] * lookback + [ahead] * (4 - lookback))
    y = model.cls_frames(model.positions.add(model.patch_embed(x)).unflatten(1, (4, 6))).flatten(1, 2)
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(y)).unflatten(2, (3, 4, 12)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * 12**-0.5).exp() * allowed * kept[:, None, None]
        y = y + block.attn.proj(
            (weights / weights.sum(-1, keepdim=True).clamp_min(1e-20) @ v).transpose(1, 2).flatten(2)
        )
        y = y + block.mlp(block.norm2(y))
    y = model.norm(y)
    expected = y[:, 6:-6].gather(1, keep[..., None].expand(-1, -1, 48))
    torch.testing.assert_close(model.forward_features(x, keep), expected, atol=2e-5, rtol=0)
    logits = model.head(model.pool(torch.stack([y[:, :6], y[:, -6:]], dim=1)))
    torch.testing.assert_close(model(x, keep), logits, atol=2e-5, rtol=0)


def test_encoder_with_lookback_heads_only_is_causal():
    model, x = encoder(lookback_heads=4), clips()
    other = x.clone()
    other[:, :, 4:] += 1.0
    change = (model(other) - model(x)).abs().amax((0, 2)).view(4, 6)
    assert change[:2].max() == 0
    assert change[2:].min() > 0


def test_cls_frames_of_another_size_are_interpolated():
    model = encoder()
    assert model.cls_frames.resized(model.grid, (9, 2, 3)) is model.cls_frames.frames
    image = torch.nn.functional.interpolate(
        model.cls_frames.frames[1].view(2, 3, 48).permute(2, 0, 1)[None], size=(4, 5), mode="bicubic"
    )
    resized = model.cls_frames.resized(model.grid, (4, 4, 5))
    torch.testing.assert_close(resized[1], image[0].flatten(1).T, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BidirectionalTemporalAttention(24, 4, 2, 1, 6), "must add up to num_heads 4"),
        (lambda: BidirectionalTemporalAttention(24, 4, 5, -1, 6), "must add up to num_heads 4"),
        (lambda: encoder(lookback_heads=5), "must add up to num_heads 4"),
        (lambda: BidirectionalTemporalAttention(24, 5, 2, 3, 6), "5 heads do not divide the width 24"),
        (lambda: attention()(torch.zeros(1, 3, 7, 24)), r"frames \[B, F, 6, D\] expected"),
        (lambda: attention()(torch.zeros(1, 30, 24)), r"frames \[B, F, 6, D\] expected"),
        (lambda: AddCLSFrames(24, 6)(torch.zeros(1, 3, 7, 24)), r"frames \[B, F, 6, 24\] expected"),
    ],
)
def test_incompatible_sizes_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
