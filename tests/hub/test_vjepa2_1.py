"""Files laid out as V-JEPA 2.1's releases against a slow forward pass written from the published architecture."""

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tubelet import hub
from tubelet.config import ConfigError
from tubelet.hub.released import VJEPA21Weights
from tubelet.models import vision_transformer as vit
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointError

WIDTH, HEADS, DEPTH, PATCH, GRID = 48, 4, 4, 16, (2, 4, 3)
CLIP = {"img_size": (64, 48), "num_frames": 4}
PRED_WIDTH, PRED_HEADS, PRED_DEPTH = 24, 2, 3


def random_weights(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator) * (0.2 if len(shape) > 1 else 0.1)
        weights[name] = 1 + tensor if "norm" in name and name.endswith("weight") else tensor
    return weights


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def block(name, width):
    return {
        **norm(f"{name}.norm1", width),
        **linear(f"{name}.attn.qkv", 3 * width, width),
        **linear(f"{name}.attn.proj", width, width),
        **norm(f"{name}.norm2", width),
        **linear(f"{name}.mlp.fc1", 4 * width, width),
        **linear(f"{name}.mlp.fc2", width, 4 * width),
    }


def encoder_weights(seed):
    shapes = {}
    for name, frames in (("patch_embed", 2), ("patch_embed_img", 1)):
        shapes |= {f"{name}.proj.weight": (WIDTH, 3, frames, PATCH, PATCH), f"{name}.proj.bias": (WIDTH,)}
    for number in range(DEPTH):
        shapes |= block(f"blocks.{number}", WIDTH) | norm(f"norms_block.{number}", WIDTH)
    shapes |= {"img_mod_embed": (1, 1, WIDTH), "video_mod_embed": (1, 1, WIDTH)}
    weights = random_weights(shapes, seed)
    for name in ("patch_embed", "patch_embed_img"):
        weights[f"{name}.proj.weight"] *= 0.2
    return weights


def predictor_weights(levels, out):
    shapes = {f"mask_tokens.{i}": (1, 1, PRED_WIDTH) for i in range(8)}
    if levels == 1:
        shapes |= linear("predictor_embed", PRED_WIDTH, WIDTH)
    else:
        shapes |= linear("predictor_embed.0", WIDTH, levels * WIDTH) | linear("predictor_embed.2", PRED_WIDTH, WIDTH)
    for number in range(PRED_DEPTH):
        shapes |= block(f"predictor_blocks.{number}", PRED_WIDTH)
    shapes |= norm("predictor_norm", PRED_WIDTH)
    shapes |= linear("predictor_proj", out, PRED_WIDTH) | linear("predictor_proj_context", out, PRED_WIDTH)
    shapes |= {"img_mod_embed": (1, 1, PRED_WIDTH), "video_mod_embed": (1, 1, PRED_WIDTH)}
    return random_weights(shapes, 9)


def write(path, prefix="module.backbone.", **parts):
    parts = {part: {prefix + name: x for name, x in state.items()} for part, state in parts.items()}
    torch.save({**parts, "epoch": 40, "lr": 6e-4}, path)


# ---------------------------------------------------------------- the published architecture, slowly


def rotation(index, width, grid):
    """Matrix that rotates the channels of a head at a token; rows and columns are spread over 16 positions."""
    _, h, w = grid
    position = (index // (h * w), index // w % h * 15 / (h - 1), index % w * 15 / (w - 1))
    matrix, pairs = torch.eye(width, dtype=torch.float64), width // 3 // 2
    for axis in range(3):
        for pair in range(pairs):
            angle = position[axis] / 10000 ** (pair / pairs)
            first = 2 * (axis * pairs + pair)
            matrix[first : first + 2, first : first + 2] = torch.tensor(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
            )
    return matrix.float()


def layer(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normed(weights, name, x):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def run_block(weights, name, x, indices, heads, grid):
    """A block on the tokens [K, D] of one clip."""
    q, k, v = layer(weights, f"{name}.attn.qkv", normed(weights, f"{name}.norm1", x)).chunk(3, dim=-1)
    width = x.shape[-1] // heads
    rotations = torch.stack([rotation(index, width, grid) for index in indices])
    mixed = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        a, b = (torch.einsum("kij,kj->ki", rotations, y[:, part]) for y in (q, k))
        mixed.append((a @ b.T / math.sqrt(width)).softmax(-1) @ v[:, part])
    x = x + layer(weights, f"{name}.attn.proj", torch.cat(mixed, dim=-1))
    hidden = F.gelu(layer(weights, f"{name}.mlp.fc1", normed(weights, f"{name}.norm2", x)))
    return x + layer(weights, f"{name}.mlp.fc2", hidden)


def slow_levels(weights, clip, indices=None):
    """Normalized tokens of the blocks [K, D] for one clip [C, T, H, W] or image [C, 1, H, W]."""
    name, mode, frames = ("patch_embed_img", "img", 1) if clip.shape[1] == 1 else ("patch_embed", "video", 2)
    t, h, w = clip.shape[1] // frames, clip.shape[2] // PATCH, clip.shape[3] // PATCH
    indices = range(t * h * w) if indices is None else indices.tolist()
    tokens = []
    for index in indices:
        slot, y, x = index // (h * w), index // w % h, index % w
        patch = clip[:, slot * frames : (slot + 1) * frames, y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH]
        kernel = weights[f"{name}.proj.weight"]
        embedded = (kernel * patch).sum((1, 2, 3, 4)) + weights[f"{name}.proj.bias"]
        tokens.append(embedded + weights[f"{mode}_mod_embed"][0, 0])
    x, levels = torch.stack(tokens), []
    for number in range(DEPTH):
        x = run_block(weights, f"blocks.{number}", x, indices, HEADS, (t, h, w))
        levels.append(normed(weights, f"norms_block.{number}", x))
    return levels


def slow_predictor(weights, context, masks_context, masks_target, mask_index):
    """Predictions at hidden and at visible tokens for one clip, from its tokens [Kc, levels * D]."""
    if "predictor_embed.weight" in weights:
        x = layer(weights, "predictor_embed", context)
    else:
        x = layer(weights, "predictor_embed.2", F.gelu(layer(weights, "predictor_embed.0", context)))
    tokens = weights[f"mask_tokens.{mask_index}"][0].expand(len(masks_target), -1)
    x = torch.cat([x, tokens]) + weights["video_mod_embed"][0]
    indices = [*masks_context.tolist(), *masks_target.tolist()]
    for number in range(PRED_DEPTH):
        x = run_block(weights, f"predictor_blocks.{number}", x, indices, PRED_HEADS, GRID)
    x = normed(weights, "predictor_norm", x)
    seen = len(masks_context)
    return layer(weights, "predictor_proj", x[seen:]), layer(weights, "predictor_proj_context", x[:seen])


# ---------------------------------------------------------------- tests


@pytest.fixture
def video():
    return torch.randn(2, 3, 4, 64, 48, generator=torch.Generator().manual_seed(1))


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["module.backbone.", "_orig_mod.module.backbone.", "backbone._orig_mod.", ""])
@pytest.mark.parametrize("key", ["ema_encoder", "target_encoder"])
def test_encoder_is_the_average_and_gives_the_published_features(tmp_path, video, prefix, key):
    average, trained = encoder_weights(1), encoder_weights(2)
    write(tmp_path / "vit.pt", prefix, encoder=trained, **{key: average})
    encoder = hub.load_encoder(tmp_path / "vit.pt", num_heads=HEADS, **CLIP).eval()
    expected = [slow_levels(average, clip) for clip in video]
    close(encoder(video), torch.stack([levels[-1] for levels in expected]))
    close(encoder(video, all_levels=True), torch.stack([torch.cat(levels, dim=-1) for levels in expected]))
    other = hub.load_encoder(tmp_path / "vit.pt", "encoder", num_heads=HEADS, **CLIP).eval()
    close(other(video[:1]), slow_levels(trained, video[0])[-1][None])


@torch.no_grad()
def test_images_masks_and_other_sizes(tmp_path, video):
    weights = encoder_weights(1)
    write(tmp_path / "vit.pt", ema_encoder=weights)
    encoder = hub.load_encoder(tmp_path / "vit.pt", num_heads=HEADS).eval()
    image = video[:, :, 0]
    expected = torch.stack([slow_levels(weights, clip[:, :1])[-1] for clip in video])
    close(encoder(image), expected)
    close(encoder(image[:, :, None]), expected)
    mask = torch.tensor([[0, 5, 9, 23], [1, 2, 3, 17]])
    close(encoder(video, mask), torch.stack([slow_levels(weights, x, m)[-1] for x, m in zip(video, mask, strict=True)]))
    larger = torch.randn(1, 3, 2, 96, 80)
    close(encoder(larger), slow_levels(weights, larger[0])[-1][None])


@torch.no_grad()
@pytest.mark.parametrize(("levels", "out"), [(4, 4 * WIDTH), (1, 104)])
def test_predictor_of_a_pretraining_and_of_a_distillation(tmp_path, levels, out):
    """The latter reads the last level only and predicts features of a wider teacher."""
    weights = predictor_weights(levels, out)
    write(tmp_path / "vit.pt", ema_encoder=encoder_weights(1), predictor=weights)
    predictor = hub.load_predictor(tmp_path / "vit.pt", num_heads=HEADS, pred_num_heads=PRED_HEADS, **CLIP).eval()
    assert len(predictor.predictor_blocks) == PRED_DEPTH
    context, masks_context, masks_target = torch.randn(2, 5, levels * WIDTH), torch.arange(5), torch.arange(7, 24)
    masks = [mask.expand(2, -1) for mask in (masks_context, masks_target)]
    hidden, visible = predictor(context, None, *masks, 3, return_context=True)
    expected = [slow_predictor(weights, x, masks_context, masks_target, 3) for x in context]
    close(hidden, torch.stack([pair[0] for pair in expected]))
    close(visible, torch.stack([pair[1] for pair in expected]))
    assert hidden.shape == (2, 17, out)


def test_sizes_that_no_shape_tells_are_asked_for(tmp_path):
    write(tmp_path / "vit.pt", ema_encoder=encoder_weights(1), predictor=predictor_weights(1, WIDTH))
    with pytest.raises(ConfigError, match="no published model has this name or size.*give, as in training, num_heads="):
        hub.load_encoder(tmp_path / "vit.pt")
    with pytest.raises(ConfigError, match="give, as in training, pred_num_heads="):
        hub.load_predictor(tmp_path / "vit.pt", num_heads=HEADS)
    with pytest.raises(ConfigError, match="'target_encode' is not in the file"):
        hub.load_encoder(tmp_path / "vit.pt", "target_encode", num_heads=HEADS)


@pytest.mark.parametrize(
    ("name", "num_heads", "hidden", "levels"),
    [
        ("vit_base", 12, 3072, (2, 5, 8, 11)),
        ("vit_large", 16, 4096, (5, 11, 17, 23)),
        ("vit_giant_xformers", 22, 6144, (9, 19, 29, 39)),
        ("vit_gigantic_xformers", 26, 8192, (11, 23, 37, 47)),
    ],
)
def test_released_sizes_follow_from_the_weights(name, num_heads, hidden, levels):
    with torch.device("meta"):
        model = getattr(vit, name)(num_frames=4, use_rope=True, levels=4, image_tokenizer=True)
        encoder = VJEPA21Weights(Path("vit.pt"), {"target_encoder": model.state_dict()}, {}).build_encoder({})
    assert (encoder.embed_dim, len(encoder.blocks)) == (model.embed_dim, len(model.blocks))
    assert (encoder.num_heads, encoder.blocks[0].mlp.fc1.out_features, encoder.levels) == (num_heads, hidden, levels)
    assert encoder.positions.rope_extent == 16
    assert encoder.norm.eps == 1e-6


def test_missing_weights_are_listed(tmp_path):
    weights = encoder_weights(1)
    del weights["norms_block.1.weight"]
    write(tmp_path / "vit.pt", ema_encoder=weights)
    with pytest.raises(CheckpointError, match="missing: level_norms.1.weight"):
        hub.load_encoder(tmp_path / "vit.pt", num_heads=HEADS)


def test_two_averages_are_read_with_a_warning(tmp_path, video, caplog):
    write(tmp_path / "vit.pt", ema_encoder=encoder_weights(1), target_encoder=encoder_weights(2))
    with caplog.at_level(logging.WARNING):
        first = hub.load_encoder(tmp_path / "vit.pt", "target_encoder", num_heads=HEADS)
    assert "has a target_encoder and an ema_encoder" in caplog.text
    second = hub.load_encoder(tmp_path / "vit.pt", "ema_encoder", num_heads=HEADS)
    for encoder, seed in ((first, 2), (second, 1)):
        assert torch.equal(encoder.norm.weight, encoder_weights(seed)["norms_block.3.weight"])


def test_what_the_last_tokens_of_clips_do_not_use_is_frozen_or_left_out(tmp_path, video):
    write(tmp_path / "vit.pt", ema_encoder=encoder_weights(1))
    encoder = hub.load_encoder(tmp_path / "vit.pt", num_heads=HEADS)
    encoder(video).sum().backward()
    assert {n for n, p in encoder.named_parameters() if p.grad is None} == {
        n for n, p in encoder.named_parameters() if not p.requires_grad
    }
    small = hub.load_encoder(tmp_path / "vit.pt", num_heads=HEADS, levels=1, image_tokenizer=False)
    assert small.state_dict().keys() == {n for n, p in encoder.named_parameters() if p.requires_grad}
    torch.testing.assert_close(small(video), encoder(video))
    parts = hub.read_parts(tmp_path / "vit.pt", {"target_encoder": small})
    checkpoint.load_weights(small, parts["target_encoder"], "target_encoder")


def test_export_is_refused(tmp_path):
    write(tmp_path / "vit.pt", ema_encoder=encoder_weights(1))
    with pytest.raises(ConfigError, match="levels.*image_tokenizer.*rope_extent"):
        hub.export(tmp_path / "vit.pt", tmp_path / "exported", num_heads=HEADS)
