import inspect
from functools import partial

import pytest
import timm
import torch
from einops import rearrange
from transformers import TimesformerConfig, TimesformerForVideoClassification, TimesformerModel

from tests.models.tokens import random_masks, randomised, take
from tubelet.grid import ClipShape, Grid
from tubelet.layers.groups import FoldedTokens, ScatteredTokens
from tubelet.models import build_encoder, inflatable
from tubelet.models import timesformer as zoo
from tubelet.models.timesformer import TimeSformer

TYPES = {"divided": "divided_space_time", "joint": "joint_space_time", "space_only": "space_only"}
SMALL = {
    "img_size": 32, "patch_size": 8, "num_frames": 3, "embed_dim": 48, "depth": 3, "num_heads": 4,
    "norm_layer": partial(torch.nn.LayerNorm, eps=1e-6),
}  # fmt: skip


def small(**arguments):
    return randomised(TimeSformer(**{**SMALL, **arguments}))


def clips(batch=2, frames=3, height=32, width=32, seed=1):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed))


masks = partial(random_masks, 48)


def config_of_transformers(attention_type, **arguments):
    return TimesformerConfig(
        image_size=32, patch_size=8, num_frames=3, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=192, attention_type=TYPES[attention_type], **arguments,
    )  # fmt: skip


def weights_from_transformers(reference):
    """Convert the state of a TimesformerModel; the CLS token and its position are a single parameter here."""
    state = reference.state_dict()
    position = state.pop("embeddings.position_embeddings")[0]
    converted = {
        "cls_token": state.pop("embeddings.cls_token") + position[0],
        "positions.table": position[1:],
        "patch_embed.proj.weight": state.pop("embeddings.patch_embeddings.projection.weight")[:, :, None],
        "patch_embed.proj.bias": state.pop("embeddings.patch_embeddings.projection.bias"),
    }
    if "embeddings.time_embeddings" in state:
        converted["time_positions.table"] = state.pop("embeddings.time_embeddings")[0]
    names = {
        "encoder.layer": "blocks", "temporal_attention.attention.qkv": "temporal_attn.qkv",
        "temporal_attention.output.dense": "temporal_attn.proj", "temporal_layernorm": "temporal_norm",
        "temporal_dense": "temporal_proj", "attention.attention.qkv": "attn.qkv",
        "attention.output.dense": "attn.proj", "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2",
        "layernorm_before": "norm1", "layernorm_after": "norm2", "layernorm": "norm",
    }  # fmt: skip
    for name, value in state.items():
        for old_name, new_name in names.items():
            name = name.replace(old_name, new_name)
        converted[name] = value
    return converted


@pytest.mark.parametrize("attention_type", TYPES)
def test_equals_transformers(attention_type):
    reference = randomised(TimesformerModel(config_of_transformers(attention_type)))
    model = small(attention_type=attention_type)
    model.load_state_dict(weights_from_transformers(reference))
    x = clips()
    with torch.no_grad():
        expected = reference(x.transpose(1, 2)).last_hidden_state
        if attention_type == "space_only":  # transformers treats frames as samples
            expected = rearrange(expected[:, 1:], "(B t) n D -> B (t n) D", B=2)
        else:
            expected = rearrange(expected[:, 1:], "B (n t) D -> B (t n) D", t=3)
        assert expected.std() > 0.1
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention_type", TYPES)
def test_logits_equal_transformers(attention_type):
    reference = randomised(TimesformerForVideoClassification(config_of_transformers(attention_type, num_labels=5)))
    model = small(attention_type=attention_type, num_classes=5)
    head = {f"head.{name}": value for name, value in reference.classifier.state_dict().items()}
    model.load_state_dict(weights_from_transformers(reference.timesformer) | head)
    x = clips()
    with torch.no_grad():
        expected = reference(x.transpose(1, 2)).logits
        if attention_type == "space_only":  # the paper averages the predictions for the frames
            expected = expected.unflatten(0, (2, 3)).mean(1)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention_type", TYPES)
def test_masked_encoder_equals_full_encoder_with_dropped_keys_hidden(attention_type, monkeypatch):
    """All tokens pass the blocks, with a loop over frames and locations; dropped tokens are masked as keys."""
    model, x, keep = small(attention_type=attention_type, num_classes=5), clips(), masks()
    kept = torch.zeros(2, 48, dtype=torch.bool).scatter(1, keep, True)

    def attention(q, k, v, visible):  # each [B, N, H, d], visible [B, N]
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        logits = logits.masked_fill(~visible[:, None, None], -1e9)
        return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v)

    class MaskedTokens(FoldedTokens):
        def over_space(self, q, k, v, **options):
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            visible = torch.cat([torch.ones(2, 3, 1, dtype=torch.bool), kept.view(2, 3, 16)], dim=2)
            parts = [z.unflatten(1, (3, 17)) for z in (q, k, v)]
            y = torch.cat([attention(*(z[:, t] for z in parts), visible[:, t]) for t in range(3)], dim=1)
            return y.transpose(1, 2)

        def over_time(self, q, k, v, **options):
            q, k, v = (z.transpose(1, 2) for z in (q, k, v))
            parts = [z.unflatten(1, (3, 16)) for z in (q, k, v)]
            visible = kept.view(2, 3, 16)
            locations = [attention(*(z[:, :, n] for z in parts), visible[:, :, n]) for n in range(16)]
            return torch.stack(locations, dim=2).flatten(1, 2).transpose(1, 2)

    def joint_attention(q, k, v, **options):  # [B, H, N, d]
        visible = torch.cat([torch.ones(2, 1, dtype=torch.bool), kept], dim=1)
        return attention(*(z.transpose(1, 2) for z in (q, k, v)), visible).transpose(1, 2)

    with torch.no_grad():
        tokens, logits = model.forward_features(x, keep), model(x, keep)
        monkeypatch.setattr(inflatable, "FoldedTokens", MaskedTokens)
        if attention_type == "joint":
            monkeypatch.setattr(model, "run", lambda block, x: block(x, None, joint_attention))
        torch.testing.assert_close(tokens, take(model.forward_features(x), keep), atol=1e-5, rtol=0)
        torch.testing.assert_close(logits, model(x), atol=1e-5, rtol=0)


def test_a_frame_without_kept_patches_causes_no_nan():
    """No patch of the last frame is kept, so its copy of the CLS token attends to itself only."""
    model, x = small(num_classes=5), clips()
    model(x, random_masks(32)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "groups", [FoldedTokens(Grid(3, 2, 2)), ScatteredTokens(torch.tensor([[0, 11, 5], [3, 2, 9]]), Grid(3, 2, 2))]
)
def test_split_inverts_join(groups):
    tokens = 12 if isinstance(groups, FoldedTokens) else 3
    frames, x = torch.randn(2, 3, 8), torch.randn(2, tokens, 8)
    for result, original in zip(groups.split(groups.join(frames, x)), (frames, x), strict=True):
        assert torch.equal(result, original)


def test_frames_are_independent_only_with_space_only_attention():
    x = clips()
    other = x.clone()
    other[:, :, 2] = clips(frames=1, seed=5)[:, :, 0]
    for attention_type, same in (("space_only", True), ("divided", False), ("joint", False)):
        model = small(attention_type=attention_type)
        difference = (model(x) - model(other))[:, :32].abs().max()
        assert (difference < 1e-6) == same


def test_interpolated_positions_are_the_sum_of_temporal_and_spatial_ones():
    model = small()
    space = model.positions.table.T.view(1, 48, 4, 4)
    time = model.time_positions.table.T.view(1, 48, 3)
    space = torch.nn.functional.interpolate(space, size=(2, 6), mode="bilinear").flatten(2)[0].T
    time = torch.nn.functional.interpolate(time, size=5, mode="linear")[0].T
    expected = (time[:, None] + space).flatten(0, 1)
    positions = model.positions((5, 2, 6)) + model.time_positions((5, 2, 6))
    torch.testing.assert_close(positions, expected, atol=1e-6, rtol=0)


def test_tubelets_of_two_frames():
    model = small(num_frames=4, tubelet_size=2)
    assert model.grid == (2, 4, 4)
    assert model(clips(frames=4)).shape == (2, 32, 48)


def image_vit(**arguments):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 0}
    return randomised(timm.models.vision_transformer.VisionTransformer(**{**options, **arguments}), seed=3)


@pytest.mark.parametrize("attention_type", ["divided", "space_only"])
def test_inflated_image_vit_gives_its_tokens_for_a_still_clip(attention_type):
    """Not with joint attention, where more frames give patches more weight than the CLS token."""
    model, image = small(attention_type=attention_type), image_vit()
    model.init_from_image_vit(image)
    x = clips(frames=1)
    with torch.no_grad():
        expected = image.forward_features(x[:, :, 0])[:, 1:]
        tokens = model(x.expand(-1, -1, 3, -1, -1)).unflatten(1, (3, 16))
    torch.testing.assert_close(tokens, expected[:, None].expand_as(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
def test_inflated_image_vit_equals_joint_attention_for_one_frame(grid):
    """Positions are resampled bilinearly for another image size."""
    h, w = grid
    model, image = small(attention_type="joint", num_frames=1, img_size=(8 * h, 8 * w)), image_vit()
    model.init_from_image_vit(image)
    x = clips(frames=1, height=8 * h, width=8 * w)
    with torch.no_grad():
        position = image.pos_embed[:, 1:].mT.unflatten(2, (4, 4))
        position = torch.nn.functional.interpolate(position, size=grid, mode="bilinear").flatten(2).mT
        y = image.patch_embed.proj(x[:, :, 0]).flatten(2).mT + position
        y = torch.cat([(image.cls_token + image.pos_embed[:, :1]).expand(2, -1, -1), y], dim=1)
        expected = image.norm(image.blocks(y))[:, 1:]
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ({"depth": 2}, "of the image model are .48, 2, 4, 8., of this encoder .48, 3, 4, 8."),
        ({"num_heads": 3}, "use an image ViT of the same size"),
        ({"init_values": 0.1}, "not a plain image ViT"),
        ({"reg_tokens": 2}, "register tokens"),
        ({"class_token": False, "global_pool": "avg"}, "fc_norm=False"),
    ],
)
def test_other_image_models_raise(image, message):
    with pytest.raises(ValueError, match=message):
        small().init_from_image_vit(image_vit(**image))


def test_only_plain_image_vits_can_be_inflated():
    with pytest.raises(ValueError, match="not a plain image ViT"):
        small().init_from_image_vit(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="tubelet_init 'middle': expected one of central_frame"):
        small().init_from_image_vit(image_vit(), "middle")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_type": "divide"}, "attention_type 'divide': expected one of divided, joint, space_only"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimeSformer(**{**SMALL, **arguments})


def test_factories():
    expected = set(inspect.signature(TimeSformer).parameters)
    for name in zoo.SIZES:
        make = getattr(zoo, name)
        assert set(inspect.signature(make).parameters) == expected
        with torch.device("meta"):
            model = make()
        size = zoo.SIZES[name]
        assert (model.embed_dim, len(model.blocks), model.num_heads) == tuple(size.values())
        assert model.norm.eps == 1e-6
    encoder = build_encoder({"name": "timesformer_tiny", "depth": 2}, ClipShape(4, 32, 8, 2))
    assert encoder.grid == (2, 4, 4)
