import inspect

import pytest
import torch
from transformers import VJEPA2Config, VJEPA2Model

from tests.models.tokens import take
from tests.rotation import rotated
from tubelet import hub
from tubelet.grid import ClipShape, Grid
from tubelet.models import build_encoder, build_predictor
from tubelet.models import vision_transformer as vit
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.vision_transformer import VisionTransformer

SMALL = {"img_size": 32, "patch_size": 8, "num_frames": 4, "embed_dim": 48, "depth": 3, "num_heads": 2}


def small(**arguments):
    torch.manual_seed(0)
    model = VisionTransformer(**{**SMALL, "init_std": 0.1, **arguments}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def clips(batch=2, frames=4, height=32, width=32):
    return torch.randn(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(1))


def masks(batch=2, total=32, keep=9, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(total, generator=generator)[:keep].sort().values for _ in range(batch)])


@pytest.fixture(scope="module")
def transformers_pair(tmp_path_factory):
    """transformers' model with random weights and ours with the same, through a saved folder."""
    torch.manual_seed(0)
    theirs = VJEPA2Model(
        VJEPA2Config(
            crop_size=64, patch_size=16, frames_per_clip=8, tubelet_size=2, hidden_size=96, num_attention_heads=3,
            num_hidden_layers=4, pred_hidden_size=48, pred_num_attention_heads=2, pred_num_hidden_layers=3,
            pred_num_mask_tokens=2, initializer_range=0.1,
        )
    ).eval()  # fmt: skip
    for name, parameter in theirs.named_parameters():
        if name.endswith("bias") or "mask_tokens" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("vjepa2")
    theirs.save_pretrained(folder)
    return theirs, hub.load_encoder(folder).eval(), folder


def test_encoder_equals_transformers(transformers_pair):
    theirs, ours, _ = transformers_pair
    x = clips(frames=8, height=64, width=64)
    with torch.no_grad():
        expected = theirs(x.transpose(1, 2), skip_predictor=True).last_hidden_state
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=0)


def test_masked_encoder_equals_transformers_blocks_on_kept_tokens(transformers_pair):
    theirs, ours, _ = transformers_pair
    x, keep = clips(frames=8, height=64, width=64), masks(total=64, keep=20)
    with torch.no_grad():
        hidden = take(theirs.encoder.embeddings(x.transpose(1, 2)), keep)
        for layer in theirs.encoder.layer:
            hidden = layer(hidden, keep)[0]
        torch.testing.assert_close(ours(x, keep), theirs.encoder.layernorm(hidden), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_rope", [False, True])
@pytest.mark.parametrize("use_silu", [False, True])
def test_masked_encoder_equals_full_encoder_with_restricted_attention(use_rope, use_silu):
    """All tokens go through the blocks; every token may attend to the kept ones only."""
    model = small(use_rope=use_rope, use_silu=use_silu)
    x, keep = clips(), masks()
    restriction = torch.full((2, 1, 1, 32), -torch.inf).scatter(3, keep[:, None, None], 0.0)
    y = model.positions.add(model.patch_embed(x))
    rope = model.positions.rope()
    for block in model.blocks:
        q, k, v = block.attn.qkv(block.norm1(y)).view(2, 32, 3, 2, 24).permute(2, 0, 3, 1, 4)
        if rope is not None:
            q, k = (rotated(z, rope.rotation[:, :, 0].transpose(1, 2)) for z in (q, k))
        weights = (q @ k.mT * 24**-0.5 + restriction).softmax(-1)
        y = y + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        y = y + block.mlp(block.norm2(y))
    torch.testing.assert_close(model(x, keep), take(model.norm(y), keep), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_rope", [False, True])
def test_keeping_all_tokens_in_any_order_changes_nothing(use_rope):
    model, x = small(use_rope=use_rope), clips()
    order = masks(keep=32)[:, torch.randperm(32)]
    torch.testing.assert_close(model(x, order), take(model(x), order), atol=1e-5, rtol=0)


def test_dropped_patches_are_never_read():
    model, x, keep = small(), clips(), masks()
    mask = torch.ones(2, 32, dtype=torch.bool).scatter(1, keep, False).view(2, 2, 4, 4)
    pixels = mask.repeat_interleave(2, 1).repeat_interleave(8, 2).repeat_interleave(8, 3)[:, None]
    torch.testing.assert_close(model(x.masked_fill(pixels, torch.nan), keep), model(x, keep))


def test_list_of_masks_gives_list_of_features():
    model, x = small(), clips()
    first, second = masks(keep=5), masks(keep=12, seed=3)
    for features, mask in zip(model(x, [first, second]), (first, second), strict=True):
        assert torch.equal(features, model(x, mask))


def test_out_layers_are_normed_intermediate_features():
    model, x = small(), clips()
    y = model.positions.add(model.patch_embed(x))
    expected = []
    for block in model.blocks:
        y = block(y)
        expected.append(model.norm(y))
    layers = small(out_layers=[0, 2])(x)
    assert len(layers) == 2
    torch.testing.assert_close(layers[0], expected[0])
    torch.testing.assert_close(layers[1], expected[2])
    nested = small(out_layers=[0, 2])(x, [masks(), masks(keep=4)])
    assert [[f.shape[1] for f in features] for features in nested] == [[9, 9], [4, 4]]


@pytest.mark.parametrize("use_rope", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(use_rope):
    gradients = []
    for saving in (False, True):
        model = small(use_rope=use_rope, use_activation_checkpointing=saving).train()
        model(clips(), masks()).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, saved in zip(*gradients, strict=True):
        torch.testing.assert_close(saved, plain)


@pytest.mark.parametrize("use_rope", [False, True])
@pytest.mark.parametrize(("frames", "height", "width"), [(2, 32, 32), (8, 16, 40), (6, 24, 56)])
def test_other_lengths_and_sizes(use_rope, frames, height, width):
    model = small(use_rope=use_rope)
    grid = model.grid_size(frames, height, width)
    assert grid == (frames // 2, height // 8, width // 8)
    x = clips(1, frames, height, width)
    assert model(x).shape == (1, grid[0] * grid[1] * grid[2], 48)
    some = torch.tensor([[0, 2, 3]])
    assert model(x, some).shape == (1, 3, 48)
    if use_rope:  # built for that size, the tables are the same
        torch.testing.assert_close(model(x), small(use_rope=True, num_frames=frames, img_size=(height, width))(x))


def test_images():
    model, image = small(num_frames=1), torch.randn(2, 3, 32, 32)
    assert isinstance(model.patch_embed.proj, torch.nn.Conv2d)
    assert model(image).shape == (2, 16, 48)
    assert torch.equal(model(image), model(image[:, :, None]))
    torch.testing.assert_close(model(image, masks(total=16, keep=16)), model(image), atol=1e-5, rtol=0)
    assert model(torch.randn(2, 3, 40, 16)).shape == (2, 10, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 5}, "5 heads do not divide the width 48"),
        ({"img_size": 36}, "crop_size 36 is not divisible by patch_size 8"),
        ({"num_frames": 5}, "num_frames 5 is not divisible by tubelet_size 2"),
        ({"out_layers": [3]}, "the layers are 0 to 2"),
        ({"use_rope": True, "num_heads": 16}, "even number of channels"),
        ({"embed_dim": 52, "uniform_power": False}, "multiple of 8"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**SMALL, **arguments})


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 3, 3, 32, 32), (1, 3, 4, 30, 32)])
def test_clips_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"is not divisible|takes clips"):
        small()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"takes images"):
        small(num_frames=1)(torch.zeros(1, 3, 4, 32, 32))


@pytest.mark.parametrize("use_rope", [False, True])
def test_bf16_autocast_is_close_to_fp32(use_rope):
    model, x = small(use_rope=use_rope), clips()
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x, masks())
    assert (low.float() - model(x, masks())).abs().max() < 0.15


@pytest.mark.parametrize("name", sorted(vit.SIZES))
def test_factories_have_their_published_sizes(name):
    with torch.device("meta"):
        model = getattr(vit, name)()
    size = vit.SIZES[name]
    assert (model.embed_dim, len(model.blocks), model.num_heads) == (
        size["embed_dim"],
        size["depth"],
        size["num_heads"],
    )
    hidden = {1408: 6144, 1664: 8192}.get(model.embed_dim, 4 * model.embed_dim)
    assert model.blocks[0].mlp.fc1.out_features == hidden
    assert model.norm.eps == 1e-6


def test_factories_forward_every_argument_and_refuse_unknown_ones():
    expected = set(inspect.signature(VisionTransformer).parameters)
    for name in vit.SIZES:
        assert set(inspect.signature(getattr(vit, name)).parameters) == expected
    with pytest.raises(TypeError, match="use_ropes"):
        vit.vit_tiny(use_ropes=True)


def test_issue_defaults():
    defaults = {name: p.default for name, p in inspect.signature(VisionTransformer).parameters.items()}
    stated = {
        "img_size": 224, "patch_size": 16, "num_frames": 1, "tubelet_size": 2, "in_chans": 3, "embed_dim": 768,
        "depth": 12, "num_heads": 12, "mlp_ratio": 4.0, "qkv_bias": True, "qk_scale": None, "drop_rate": 0.0,
        "attn_drop_rate": 0.0, "norm_layer": torch.nn.LayerNorm, "init_std": 0.02, "out_layers": None,
        "uniform_power": True,
    }  # fmt: skip
    assert {name: defaults[name] for name in stated} == stated


def test_build_encoder_and_predictor_pass_every_option():
    clip = ClipShape(4, 32, 8, 2)
    shared = {"use_rope": True, "rope_pairing": "vjepa2", "use_silu": True, "wide_silu": False}
    shared["use_activation_checkpointing"] = True
    encoder = build_encoder({"name": "vit_tiny", "depth": 2, "drop_rate": 0.1, **shared}, clip)
    noise = {"use_mask_tokens": False, "noise_schedule": "vjepa", "noise_steps": 50}
    predictor = build_predictor({"depth": 3, "embed_dim": 96, "num_heads": 4, **noise, **shared}, encoder, clip, 2)
    assert (len(encoder.blocks), encoder.grid, encoder.blocks[0].attn.proj_drop.p) == (2, (2, 4, 4), 0.1)
    assert (len(predictor.predictor_blocks), predictor.num_heads, len(predictor.alphas)) == (3, 4, 50)
    assert (predictor.predictor_embed_dim, predictor.predictor_proj.out_features) == (96, 192)
    for part, blocks in ((encoder, encoder.blocks), (predictor, predictor.predictor_blocks)):
        assert part.positions.use_rope
        assert part.positions.rope_pairing == "vjepa2"
        assert part.use_activation_checkpointing
        assert blocks[0].mlp.fc3.in_features == 4 * blocks[0].norm1.normalized_shape[0]
    default = build_predictor({}, encoder, clip, num_mask_tokens=5)
    assert (default.num_heads, len(default.mask_tokens)) == (encoder.num_heads, 5)


@pytest.mark.parametrize("depth_scaled_init", [True, False])
def test_depth_scaled_init_divides_the_outputs_of_deep_blocks(depth_scaled_init):
    torch.manual_seed(0)
    encoder = VisionTransformer(img_size=32, patch_size=8, depth=4, depth_scaled_init=depth_scaled_init)
    predictor = VisionTransformerPredictor(img_size=32, patch_size=8, depth=4, depth_scaled_init=depth_scaled_init)
    for blocks in (encoder.blocks, predictor.predictor_blocks):
        for number, block in enumerate(blocks, start=1):
            for layer in (block.attn.proj, block.mlp.output):
                expected = 0.02 / (2 * number) ** 0.5 if depth_scaled_init else 0.02
                assert float(layer.weight.detach().std()) == pytest.approx(expected, rel=0.02)
            assert float(block.attn.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize("use_rope", [False, True])
def test_block_causal_features_do_not_depend_on_later_frames(use_rope):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "num_frames": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    encoder = VisionTransformer(**sizes, use_rope=use_rope, block_causal=True, init_std=0.2)
    clips = torch.randn(2, 3, 8, 32, 32)
    changed = clips.clone()
    changed[:, :, 4:] += 1.0  # the slots 2 and 3 of 16 tokens each
    keep = torch.stack([torch.randperm(64)[:30].sort().values for _ in range(2)])
    for masks in (None, keep):
        before, after = encoder(clips, masks), encoder(changed, masks)
        index = torch.arange(64).expand(2, 64) if masks is None else masks
        torch.testing.assert_close(after[index < 32], before[index < 32])
        assert (after - before)[index >= 32].abs().amax(-1).min() > 1e-3
    # The first slot is that of a clip without later frames; and in a slot, tokens see each other.
    moved = clips.clone()
    moved[:, :, :2, :8, :8] += 1.0
    assert (encoder(moved) - encoder(clips)).abs().amax(-1).min() > 1e-5
    if use_rope:
        torch.testing.assert_close(encoder(clips)[:, :32], encoder(clips[:, :, :4]))


def test_block_causal_attention_against_a_loop():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "num_frames": 6, "embed_dim": 12, "depth": 1, "num_heads": 1}
    encoder = VisionTransformer(**sizes, block_causal=True, init_std=0.5)
    clips, keep = torch.randn(1, 3, 6, 16, 16), torch.tensor([[0, 2, 3, 5, 8, 11]])
    block = encoder.blocks[0]
    x = encoder.positions.add(encoder.patch_embed(clips, keep), keep)
    q, k, v = block.attn.qkv(block.norm1(x))[0].split(12, dim=-1)
    mixed = []
    for i, token in enumerate(keep[0]):
        seen = [j for j, other in enumerate(keep[0]) if other // 4 <= token // 4]
        weights = torch.softmax(k[seen] @ q[i] / 12**0.5, dim=0)
        mixed.append(weights @ v[seen])
    x = x + block.attn.proj(torch.stack(mixed))[None]
    x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(encoder(clips, keep), encoder.norm(x))


@torch.no_grad()
def test_levels_are_the_tokens_after_their_blocks_each_with_its_own_norm():
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=8, num_frames=4, embed_dim=24, depth=6, num_heads=2, levels=3)
    for norm in (*model.level_norms, model.norm):
        norm.weight.normal_()
        norm.bias.normal_()
    video, mask = torch.randn(2, 3, 4, 32, 32), torch.tensor([[0, 5, 9], [1, 2, 31]])
    x = model.positions.add(model.patch_embed(video))
    expected = []
    for number, block in enumerate(model.blocks):
        x = block(x)
        if number in (1, 3, 5):
            expected.append({1: model.level_norms[0], 3: model.level_norms[1], 5: model.norm}[number](x))
    assert model.levels == (1, 3, 5)
    torch.testing.assert_close(model(video, all_levels=True), torch.cat(expected, dim=-1))
    torch.testing.assert_close(model(video, [mask], all_levels=True)[0][..., -24:], model(video, mask))
    model.out_layers = [3, 4]
    torch.testing.assert_close(model(video)[0], expected[1])


@torch.no_grad()
def test_image_tokenizer_embeds_single_frames():
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, num_frames=4, embed_dim=24, depth=2, num_heads=2, use_rope=True, image_tokenizer=True
    )
    image = torch.randn(2, 3, 32, 32)
    x, rope = model.patch_embed_img(image[:, :, None]), model.positions.rope(None, Grid(1, 4, 4))
    for block in model.blocks:
        x = block(x, rope)
    torch.testing.assert_close(model(image[:, :, None]), model.norm(x))
    torch.testing.assert_close(model(image), model.norm(x))
    assert model.grid_size(1, 32, 32) == (1, 4, 4)
    assert model(torch.randn(2, 3, 4, 32, 32)).shape == (2, 32, 24)
    with pytest.raises(ValueError, match="image_tokenizer: an encoder of images has one"):
        VisionTransformer(num_frames=1, image_tokenizer=True)


def test_subtract_mean_frame_removes_what_does_not_move():
    encoder, plain = small(subtract_mean_frame=True), small()
    video = clips()
    background = torch.randn(2, 3, 1, 32, 32, generator=torch.Generator().manual_seed(3))
    for keep in (None, masks()):
        torch.testing.assert_close(encoder(video + background, keep), encoder(video, keep))
        torch.testing.assert_close(encoder(video, keep), plain(video - video.mean(2, keepdim=True), keep))
    assert (plain(video + background) - plain(video)).abs().max() > 0.1
    # the mean frame of a crop is the crop of the mean frame
    torch.testing.assert_close(encoder(video[..., 8:24, 8:24]), encoder((video + background)[..., 8:24, 8:24]))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_frames": 1}, "remove it for images"),
        ({"image_tokenizer": True}, "remove it for images"),
        ({"block_causal": True}, "depends on later frames"),
    ],
)
def test_subtract_mean_frame_is_refused(arguments, reason):
    with pytest.raises(ValueError, match=f"subtract_mean_frame: .*{reason}"):
        small(subtract_mean_frame=True, **arguments)


def test_frames_before_the_channels_are_named():
    encoder = build_encoder({"name": "vit_tiny", "depth": 1}, ClipShape(4, 32, patch_size=16))
    with pytest.raises(ValueError, match=r"expected \[B, 3, T, H, W\], not \[1, 4, 3, 32, 32\]"):
        encoder(torch.zeros(1, 4, 3, 32, 32))
