import inspect
from functools import partial
from typing import get_args

import pytest
import timm
import torch
from torch import nn
from transformers import VivitConfig, VivitForVideoClassification

from tubelet.models import ModelConfig, build_encoder, factories
from tubelet.models import vivit as zoo
from tubelet.models.vivit import Variant, ViViT

VARIANTS = get_args(Variant)
SMALL = {
    "img_size": 32, "patch_size": 8, "num_frames": 6, "embed_dim": 48, "depth": 3, "num_heads": 4,
    "norm_layer": partial(nn.LayerNorm, eps=1e-6),
}  # fmt: skip


def randomised(model, std=0.1, seed=0):
    """All parameters random, biases and norms too, so that none can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return model.eval()


def small(**arguments):
    return randomised(ViViT(**{**SMALL, **arguments}))


def clips(batch=2, frames=6, height=32, width=32, seed=1):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed))


def masks(batch=2, total=48, keep=17, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(total, generator=generator)[:keep] for _ in range(batch)])


def take(features, indices):
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))


@pytest.mark.parametrize(
    ("activation", "act_layer"),
    [("gelu", nn.GELU), ("gelu_fast", partial(nn.GELU, approximate="tanh"))],  # the released weights need the second
)
def test_spatio_temporal_equals_transformers(activation, act_layer):
    theirs = randomised(
        VivitForVideoClassification(
            VivitConfig(
                image_size=32, num_frames=6, tubelet_size=[2, 8, 8], hidden_size=48, num_hidden_layers=3,
                num_attention_heads=4, intermediate_size=192, hidden_act=activation, num_labels=5,
            )
        )
    )  # fmt: skip
    state = theirs.vivit.state_dict()
    position = state["embeddings.position_embeddings"][0]
    weights = {
        "cls_token": state["embeddings.cls_token"] + position[0],
        "positions.table": position[1:],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = state[f"embeddings.patch_embeddings.projection.{kind}"]
        weights[f"head.{kind}"] = theirs.classifier.state_dict()[kind]
        for layer in range(3):
            qkv = [state[f"layers.{layer}.attention.{name}_proj.{kind}"] for name in "qkv"]
            weights[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(qkv)
            for ours, name in (
                ("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
                ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
            ):  # fmt: skip
                weights[f"blocks.{layer}.{ours}.{kind}"] = state[f"layers.{layer}.{name}.{kind}"]
    ours = small(num_classes=5, act_layer=act_layer)
    ours.load_state_dict(weights)
    x = clips()
    with torch.no_grad():
        expected = theirs.vivit(x.transpose(1, 2)).last_hidden_state[:, 1:]
        assert expected.std() > 0.1
        torch.testing.assert_close(ours.forward_features(x), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).logits, atol=1e-5, rtol=0)


def attention(attn, x, heads=slice(None)):
    """Softmax attention written out for one group of tokens [B, n, D] -> [B, n, H, d], before the projection."""
    q, k, v = attn.qkv(x).unflatten(2, (3, attn.num_heads, attn.head_dim))[:, :, :, heads].unbind(2)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * attn.head_dim**-0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


def in_groups(attn, x, groups, heads=slice(None)):
    """The same within groups, each a list of token indices, by a loop over samples and groups -> [B, N, H, d]."""
    out = torch.empty(*x.shape[:2], len(range(attn.num_heads)[heads]), attn.head_dim)
    for sample in range(len(x)):
        for group in groups[sample]:
            out[sample, group] = attention(attn, x[sample : sample + 1, group], heads)[0]
    return out


def group_by(keys):
    """Keys [B, K] -> for each sample the lists of positions with one key."""
    return [[(row == key).nonzero()[:, 0].tolist() for key in row.unique()] for row in keys]


def loop(model, x, keep):
    """The paper's Models 2 to 4 on kept tokens, by loops -> tokens [B, K, D], what the head reads [B, D]."""
    B, K = keep.shape
    frame, place = keep // 16, keep % 16
    y = take(model.patch_embed(x), keep)
    y = y + (model.positions.table[place] if model.positions.grid[0] == 1 else model.positions.table[keep])
    if model.variant == "factorised_encoder":
        tokens, slots = torch.empty(B, K, 48), torch.empty(B, 3, 48)
        for sample in range(B):
            for t in range(3):
                of_slot = frame[sample] == t
                z = torch.cat([model.cls_token[0], y[sample, of_slot]])[None]
                for block in model.blocks:
                    z = z + block.attn.proj(attention(block.attn, block.norm1(z)).flatten(2))
                    z = z + block.mlp(block.norm2(z))
                z = model.norm(z)[0]
                slots[sample, t], tokens[sample, of_slot] = z[0], z[1:]
        slots = torch.cat([model.temporal_cls_token.expand(B, 1, 48), slots + model.temporal_positions.table], dim=1)
        for block in model.temporal_blocks:
            slots = slots + block.attn.proj(attention(block.attn, block.norm1(slots)).flatten(2))
            slots = slots + block.mlp(block.norm2(slots))
        slots = model.temporal_norm(slots)
        return tokens + torch.stack([slots[b, 1 + frame[b]] for b in range(B)]), slots[:, 0]
    for block in model.blocks:
        z = block.norm1(y)
        if model.variant == "factorised_self_attention":
            y = y + block.attn.proj(in_groups(block.attn, z, group_by(frame)).flatten(2))
            z = in_groups(block.temporal_attn, block.temporal_norm(y), group_by(place))
            y = y + block.temporal_attn.proj(z.flatten(2))
        else:
            space = in_groups(block.attn, z, group_by(frame), slice(0, 2))
            time = in_groups(block.attn, z, group_by(place), slice(2, 4))
            y = y + block.attn.proj(torch.cat([space, time], dim=2).flatten(2))
        y = y + block.mlp(block.norm2(y))
    y = model.norm(y)
    return y, y.mean(1)


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_factorised_variants_equal_loops_over_groups(variant):
    model, x = small(variant=variant, num_classes=5), clips()
    everything = torch.arange(48).expand(2, -1)
    # The last: no token of the third slot.
    for given, keep in ((None, everything), (masks(), masks()), (masks(total=32), masks(total=32))):
        with torch.no_grad():
            tokens, clip = loop(model, x, keep)
            torch.testing.assert_close(model.forward_features(x, given), tokens, atol=1e-5, rtol=0)
            torch.testing.assert_close(model(x, given), model.head(clip), atol=1e-5, rtol=0)


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
def test_every_token_depends_on_every_other_time(variant):
    """Also in the factorised encoder, whose spatial blocks see one slot alone."""
    model, x = small(variant=variant), clips()
    other = x.clone()
    other[:, :, 5] += 1
    assert ((model(x) - model(other)).abs().amax(-1) > 1e-4).all()


def image_vit(**arguments):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    return randomised(timm.models.vision_transformer.VisionTransformer(**{**options, **arguments}), seed=3)


@pytest.mark.parametrize("tubelet_size", [1, 2, 3])
def test_tubelet_embedding_from_an_image_vit(tubelet_size):
    """The central frame's embedding, or the mean of those of all frames: a still clip's is the image's either way."""
    model, image, x = small(tubelet_size=tubelet_size), image_vit(), clips()
    with torch.no_grad():
        frames = torch.stack([image.patch_embed(frame) for frame in x.unbind(2)], dim=1)
        slots = frames.unflatten(1, (-1, tubelet_size))
        model.init_from_image_vit(image, "central_frame")
        expected = slots[:, :, tubelet_size // 2].flatten(1, 2)
        torch.testing.assert_close(model.patch_embed(x), expected, atol=1e-5, rtol=0)
        model.init_from_image_vit(image, "filter_inflation")
        torch.testing.assert_close(model.patch_embed(x), slots.mean(2).flatten(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tubelet_init", ["central_frame", "filter_inflation"])
@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_from_an_image_vit_a_still_clip_gives_its_tokens(variant, tubelet_init):
    """In joint attention the patches outnumber the CLS token by the slots: there it holds for one slot.

    Never in Model 4: its heads over time see one place, where the image model's see the frame.
    """
    has_cls = variant in ("spatio_temporal", "factorised_encoder")
    image = image_vit() if has_cls else image_vit(class_token=False, global_pool="avg", fc_norm=False)
    slots = 1 if variant == "spatio_temporal" else 3
    model = small(variant=variant, num_frames=2 * slots)
    model.init_from_image_vit(image, tubelet_init)
    x = clips(frames=1)
    with torch.no_grad():
        features = image.forward_features(x[:, :, 0])[:, image.num_prefix_tokens :]
        tokens = model(x.expand(-1, -1, 2 * slots, -1, -1)).unflatten(1, (slots, 16))
        if variant == "factorised_encoder":  # the temporal encoder is new; it adds one vector to all tokens of a slot
            tokens = tokens - tokens.mean(2, keepdim=True)
            features = features - features.mean(1, keepdim=True)
    torch.testing.assert_close(tokens, features[:, None].expand_as(tokens), atol=1e-4, rtol=0)


def test_image_positions_are_repeated_over_time_and_resampled():
    model, image = small(img_size=(16, 48)), image_vit()
    model.init_from_image_vit(image)
    position = image.pos_embed[0, 1:].T.view(1, 48, 4, 4)
    expected = nn.functional.interpolate(position, size=(2, 6), mode="bilinear").flatten(2)[0].T
    for slot in model.positions.table.unflatten(0, (3, 12)):
        torch.testing.assert_close(slot, expected, atol=1e-6, rtol=0)


def test_gradient_passes_the_silent_temporal_attention():
    """Its zero projection learns at the first step, the layers before it from then on."""
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
        ({"num_heads": 3, "variant": "factorised_dot_product"}, "take an even number"),
        ({"variant": "factorized_encoder"}, "variant 'factorized_encoder': take one of spatio_temporal, "),
        ({"temporal_depth": 2}, "only factorised_encoder"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ViViT(**{**SMALL, **arguments})


def test_factories():
    expected = set(inspect.signature(ViViT).parameters)
    assert set(factories("vivit")) == set(zoo.SIZES)
    for name, make in factories("vivit").items():
        assert set(inspect.signature(make).parameters) == expected
        with torch.device("meta"):
            model = make()
        size = zoo.SIZES[name]
        assert (model.embed_dim, len(model.blocks), model.num_heads) == tuple(size.values())
        assert model.norm.eps == 1e-6
    arguments = {"depth": 2, "variant": "factorised_encoder", "temporal_depth": 1}
    model = ModelConfig(encoder="vivit", model_name="vivit_tiny", encoder_args=arguments)
    encoder = build_encoder(model, crop_size=32, num_frames=4, patch_size=8, tubelet_size=2)
    assert (encoder.grid, len(encoder.blocks), len(encoder.temporal_blocks)) == ((2, 4, 4), 2, 1)
