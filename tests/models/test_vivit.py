import inspect
from functools import partial
from typing import get_args

import pytest
import timm
import torch
from torch import nn
from transformers import VivitConfig, VivitForVideoClassification

from tests.models.tokens import random_masks, randomised, take
from tubelet.grid import ClipShape
from tubelet.models import build_encoder
from tubelet.models import vivit as zoo
from tubelet.models.vivit import Variant, ViViT

VARIANTS = get_args(Variant)
SMALL = {
    "img_size": 32, "patch_size": 8, "num_frames": 6, "embed_dim": 48, "depth": 3, "num_heads": 4,
    "norm_layer": partial(nn.LayerNorm, eps=1e-6),
}  # fmt: skip


def small(**arguments):
    return randomised(ViViT(**{**SMALL, **arguments}))


def clips(batch=2, frames=6, height=32, width=32, seed=1):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed))


masks = partial(random_masks, 48)


@pytest.mark.parametrize(
    ("activation", "act_layer"),
    [("gelu", nn.GELU), ("gelu_fast", partial(nn.GELU, approximate="tanh"))],  # the released weights need the latter
)
def test_spatio_temporal_equals_transformers(activation, act_layer):
    reference = randomised(
        VivitForVideoClassification(
            VivitConfig(
                image_size=32, num_frames=6, tubelet_size=[2, 8, 8], hidden_size=48, num_hidden_layers=3,
                num_attention_heads=4, intermediate_size=192, hidden_act=activation, num_labels=5,
            )
        )
    )  # fmt: skip
    state = reference.vivit.state_dict()
    position = state["embeddings.position_embeddings"][0]
    weights = {
        "cls_token": state["embeddings.cls_token"] + position[0],
        "positions.table": position[1:],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        weights[f"head.{kind}"] = reference.classifier.state_dict()[kind]
        for layer in range(3):
            qkv = [state[f"layers.{layer}.attention.{name}_proj.{kind}"] for name in "qkv"]
            weights[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(qkv)
            for our_name, name in (
                ("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
                ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
            ):  # fmt: skip
                weights[f"blocks.{layer}.{our_name}.{kind}"] = state[f"layers.{layer}.{name}.{kind}"]
    model = small(num_classes=5, act_layer=act_layer)
    model.load_state_dict(weights)
    x = clips()
    with torch.no_grad():
        expected = reference.vivit(x.transpose(1, 2)).last_hidden_state[:, 1:]
        assert expected.std() > 0.1
        torch.testing.assert_close(model.forward_features(x), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(x), reference(x.transpose(1, 2)).logits, atol=1e-5, rtol=0)


def attention(attn, x, heads=slice(None)):
    """Softmax attention of one group of tokens [B, n, D] -> [B, n, H, d], before the projection."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim))[:, :, :, heads].unbind(2)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * attn.head_dim**-0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def in_groups(attn, x, groups, heads=slice(None)):
    """Softmax attention within groups (lists of token indices), by a loop over clips and groups -> [B, N, H, d]."""
    out = torch.empty(*x.shape[:2], len(range(attn.num_heads)[heads]), attn.head_dim)
    for sample in range(len(x)):
        for group in groups[sample]:
            out[sample, group] = attention(attn, x[sample : sample + 1, group], heads)[0]
    return out


def group_by(keys):
    """Return for each clip the lists of positions with equal keys; keys is [B, K]."""
    return [[(row == key).nonzero()[:, 0].tolist() for key in row.unique()] for row in keys]


def loop(model, x, keep):
    """Models 2 to 4 of the paper on kept tokens, by loops -> tokens [B, K, D] and input of the head [B, D]."""
    B, K = keep.shape
    frame, location = keep // 16, keep % 16
    y = take(model.patch_embed(x), keep)
    y = y + (model.positions.table[location] if model.positions.grid[0] == 1 else model.positions.table[keep])
    if model.variant == "factorised_encoder":
        tokens, frames = torch.empty(B, K, 48), torch.empty(B, 3, 48)
        for sample in range(B):
            for t in range(3):
                in_frame = frame[sample] == t
                z = torch.cat([model.cls_token[0], y[sample, in_frame]])[None]
                for block in model.blocks:
                    z = z + block.attn.proj(attention(block.attn, block.norm1(z)).flatten(2))
                    z = z + block.mlp(block.norm2(z))
                z = model.norm(z)[0]
                frames[sample, t], tokens[sample, in_frame] = z[0], z[1:]
        frames = torch.cat([model.temporal_cls_token.expand(B, 1, 48), frames + model.temporal_positions.table], dim=1)
        for block in model.temporal_blocks:
            frames = frames + block.attn.proj(attention(block.attn, block.norm1(frames)).flatten(2))
            frames = frames + block.mlp(block.norm2(frames))
        frames = model.temporal_norm(frames)
        return tokens + torch.stack([frames[b, 1 + frame[b]] for b in range(B)]), frames[:, 0]
    for block in model.blocks:
        z = block.norm1(y)
        if model.variant == "factorised_self_attention":
            y = y + block.attn.proj(in_groups(block.attn, z, group_by(frame)).flatten(2))
            z = in_groups(block.temporal_attn, block.temporal_norm(y), group_by(location))
            y = y + block.temporal_attn.proj(z.flatten(2))
        else:
            space = in_groups(block.attn, z, group_by(frame), slice(0, 2))
            time = in_groups(block.attn, z, group_by(location), slice(2, 4))
            y = y + block.attn.proj(torch.cat([space, time], dim=2).flatten(2))
        y = y + block.mlp(block.norm2(y))
    y = model.norm(y)
    return y, y.mean(1)


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_factorised_variants_equal_loops_over_groups(variant):
    model, x = small(variant=variant, num_classes=5), clips()
    all_tokens = torch.arange(48).expand(2, -1)
    # The last mask keeps no token of the third temporal index.
    for mask, keep in ((None, all_tokens), (masks(), masks()), (random_masks(32), random_masks(32))):
        with torch.no_grad():
            tokens, pooled = loop(model, x, keep)
            torch.testing.assert_close(model.forward_features(x, mask), tokens, atol=1e-5, rtol=0)
            torch.testing.assert_close(model(x, mask), model.head(pooled), atol=1e-5, rtol=0)


def test_masked_spatio_temporal_equals_full_attention_with_dropped_keys_hidden():
    model, x, keep = small(), clips(), masks()
    hidden = torch.ones(2, 1, 1, 49, dtype=torch.bool).scatter(3, keep[:, None, None] + 1, False)
    hidden[..., 0] = False
    y = model.patch_embed(x) + model.positions.table
    y = torch.cat([model.cls_token.expand(2, -1, -1), y], dim=1)
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(y)).view(2, 49, 3, 4, 12).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * 12**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
        y = y + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        y = y + block.mlp(block.norm2(y))
    torch.testing.assert_close(model(x, keep), take(model.norm(y)[:, 1:], keep), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_token_depends_on_all_frames(variant):
    """Also in the factorised encoder, whose spatial blocks attend within a temporal index."""
    model, x = small(variant=variant), clips()
    other = x.clone()
    other[:, :, 5] += 1
    assert ((model(x) - model(other)).abs().amax(-1) > 1e-4).all()


def image_vit(**arguments):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    return randomised(timm.models.vision_transformer.VisionTransformer(**{**options, **arguments}), seed=3)


@pytest.mark.parametrize("tubelet_size", [1, 2, 3])
def test_inflated_patch_embedding(tubelet_size):
    """Central frame initialization embeds the central frame, filter inflation the mean of all frames of a tubelet."""
    model, image, x = small(tubelet_size=tubelet_size), image_vit(), clips()
    with torch.no_grad():
        frames = torch.stack([image.patch_embed(frame) for frame in x.unbind(2)], dim=1)
        tubelets = frames.unflatten(1, (-1, tubelet_size))
        model.init_from_image_vit(image, "central_frame")
        expected = tubelets[:, :, tubelet_size // 2].flatten(1, 2)
        torch.testing.assert_close(model.patch_embed(x), expected, atol=1e-5, rtol=0)
        model.init_from_image_vit(image, "filter_inflation")
        torch.testing.assert_close(model.patch_embed(x), tubelets.mean(2).flatten(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tubelet_init", ["central_frame", "filter_inflation"])
@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_inflated_image_vit_gives_its_tokens_for_a_still_clip(variant, tubelet_init):
    """With joint attention this holds for one temporal index only: more give patches more weight than the CLS token.

    It does not hold for Model 4: its temporal heads attend to one location, those of the image model to the frame.
    """
    has_cls = variant in ("spatio_temporal", "factorised_encoder")
    image = image_vit() if has_cls else image_vit(class_token=False, global_pool="avg", fc_norm=False)
    length = 1 if variant == "spatio_temporal" else 3
    model = small(variant=variant, num_frames=2 * length)
    model.init_from_image_vit(image, tubelet_init)
    x = clips(frames=1)
    with torch.no_grad():
        features = image.forward_features(x[:, :, 0])[:, image.num_prefix_tokens :]
        tokens = model(x.expand(-1, -1, 2 * length, -1, -1)).unflatten(1, (length, 16))
        if variant == "factorised_encoder":  # the temporal encoder adds one vector to all tokens of a temporal index
            tokens = tokens - tokens.mean(2, keepdim=True)
            features = features - features.mean(1, keepdim=True)
    torch.testing.assert_close(tokens, features[:, None].expand_as(tokens), atol=1e-4, rtol=0)


def test_image_positions_are_repeated_over_time_and_resampled():
    model, image = small(img_size=(16, 48)), image_vit()
    model.init_from_image_vit(image)
    position = image.pos_embed[0, 1:].T.view(1, 48, 4, 4)
    expected = nn.functional.interpolate(position, size=(2, 6), mode="bilinear").flatten(2)[0].T
    for table in model.positions.table.unflatten(0, (3, 12)):
        torch.testing.assert_close(table, expected, atol=1e-6, rtol=0)


def test_zero_initialized_temporal_attention_learns():
    """The zero projection receives a gradient in the first step, the layers before it from the second step on."""
    model = small(variant="factorised_self_attention", num_classes=5).train()
    model.init_from_image_vit(image_vit())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(clips()).square().sum().backward()
    assert all(block.temporal_attn.proj.weight.grad.abs().sum() > 0 for block in model.blocks)
    optimizer.step()
    optimizer.zero_grad()
    model(clips()).square().sum().backward()
    assert all(block.temporal_attn.qkv.weight.grad.abs().sum() > 0 for block in model.blocks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3, "variant": "factorised_dot_product"}, "use an even number"),
        ({"variant": "factorized_encoder"}, "variant 'factorized_encoder': expected one of spatio_temporal, "),
        ({"temporal_depth": 2}, "only factorised_encoder"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViViT(**{**SMALL, **arguments})


def test_factories():
    expected = set(inspect.signature(ViViT).parameters)
    for name in zoo.SIZES:
        make = getattr(zoo, name)
        assert set(inspect.signature(make).parameters) == expected
        with torch.device("meta"):
            model = make()
        size = zoo.SIZES[name]
        assert (model.embed_dim, len(model.blocks), model.num_heads) == tuple(size.values())
        assert model.norm.eps == 1e-6
    arguments = {"depth": 2, "variant": "factorised_encoder", "temporal_depth": 1}
    encoder = build_encoder({"name": "vivit_tiny", **arguments}, ClipShape(4, 32, 8, 2))
    assert (encoder.grid, len(encoder.blocks), len(encoder.temporal_blocks)) == ((2, 4, 4), 2, 1)
