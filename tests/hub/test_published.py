"""The published models, with their real names, shapes and positions of weights, on the meta device."""

import functools
import logging
from pathlib import Path

import pytest
import torch

from tubelet.config import ConfigError
from tubelet.grid import Grid
from tubelet.hub.published import PUBLISHED
from tubelet.hub.released import ReleasedWeights, VJEPA21Weights, to_tubelet
from tubelet.layers.positions import sincos_3d
from tubelet.models import vision_transformer as vit
from tubelet.models.predictor import VisionTransformerPredictor

MODELS = {
    "vitl16.pth.tar": ("vit_large", 2, 12), "vith16.pth.tar": ("vit_huge", 2, 12),
    "vith16-384.pth.tar": ("vit_huge", 2, 12), "vitl.pt": ("vit_large", 10, 12), "vith.pt": ("vit_huge", 10, 12),
    "vitg.pt": ("vit_giant_xformers", 10, 12), "vitg-384.pt": ("vit_giant_xformers", 10, 12),
    "vjepa2_1_vitb_dist_vitG_384.pt": ("vit_base", 8, 12), "vjepa2_1_vitl_dist_vitG_384.pt": ("vit_large", 8, 12),
    "vjepa2_1_vitg_384.pt": ("vit_giant_xformers", 8, 24), "vjepa2_1_vitG_384.pt": ("vit_gigantic_xformers", 8, 24),
}  # fmt: skip
V1 = [file for file in MODELS if file.endswith(".pth.tar")]
V2 = [file for file in MODELS if file.startswith("vit") and file.endswith(".pt")]


@functools.cache
def positions(width, grid):
    return sincos_3d(width, grid, uniform_power=True)[None]


def published(file):
    return next(model for model in PUBLISHED if model.file == file)


def weights(file, renamed=None, with_predictor=True):
    """The weights that a file holds: names of its kind, shapes, and real positions."""
    model, (name, mask_tokens, depth) = published(file), MODELS[file]
    is_new = model.family == "V-JEPA 2.1"
    with torch.device("meta"):
        options = {"levels": 4, "image_tokenizer": True} if is_new else {}
        encoder = getattr(vit, name)(num_frames=2, use_rope=True, **options)
        predictor = VisionTransformerPredictor(
            num_frames=2, embed_dim=model.embed_dim, depth=depth, num_heads=12, use_mask_tokens=True,
            num_mask_tokens=mask_tokens, predict_context=is_new, levels=4 if depth == 24 else 1,
            out_dim=1664 if "dist" in file else None,
        )  # fmt: skip
    states = [dict(module.state_dict()) for module in (encoder, predictor)]
    if model.family == "V-JEPA":
        side = model.img_size // 16
        grid = Grid(8, side, side)
        states[0]["pos_embed"] = positions(model.embed_dim, grid)
        states[1]["predictor_pos_embed"] = positions(384, grid)
    states = [to_tubelet({f"module.backbone.{key}": x for key, x in state.items()}) for state in states]
    parts = {"encoder": states[0], "target_encoder": states[0], "predictor": states[1]}
    if not with_predictor:
        del parts["predictor"]
    return (VJEPA21Weights if is_new else ReleasedWeights)(Path(renamed or file), parts, {})


def build(found, **arguments):
    """The modules that would load the weights, on the meta device; all names and shapes have to match."""
    state = found.parts["predictor"]
    found.check_arguments(arguments)
    found.check_arguments(arguments, state)
    with torch.device("meta"):
        encoder, predictor = found.build_encoder(arguments), found.build_predictor(arguments, state)
    for module, part in ((encoder, "target_encoder"), (predictor, "predictor")):
        stored = {name: x.shape for name, x in found.parts[part].items() if "pos_embed" not in name}
        assert {name: x.shape for name, x in module.state_dict().items()} == stored
    return encoder, predictor


@pytest.mark.parametrize("file", MODELS)
def test_a_published_file_needs_no_arguments(file, caplog):
    model = published(file)
    with caplog.at_level(logging.WARNING):
        encoder, predictor = build(weights(file))
    assert not caplog.records
    assert (encoder.num_heads, predictor.num_heads) == (model.num_heads, model.pred_num_heads)
    side = model.img_size // 16
    assert encoder.grid == predictor.positions.grid == (model.num_frames // 2, side, side)
    for positions in (encoder.positions, predictor.positions):
        assert positions.use_rope == (model.family != "V-JEPA")
        assert positions.uniform_power or positions.use_rope
        assert not positions.use_rope or positions.rope_pairing == ("vjepa2" if file in V2 else "interleaved")
        assert positions.rope_extent == (16 if model.family == "V-JEPA 2.1" else None)


@pytest.mark.parametrize("file", MODELS)
def test_a_renamed_file_is_known_by_its_content(file):
    encoder, predictor = build(weights(file, "mine.pt"))
    expected, expected_predictor = build(weights(file))
    assert (encoder.num_heads, encoder.positions.use_rope) == (expected.num_heads, expected.positions.use_rope)
    assert predictor.num_heads == expected_predictor.num_heads


def test_the_giant_of_384_pixels_differs_by_its_name_only(caplog):
    build(weights("vitg-384.pt", "mine.pt"))
    assert "assumed img_size=256 and num_frames=64, to which the predictor's indices of tokens refer" in caplog.text
    caplog.clear()
    assert build(weights("vitg-384.pt", "mine.pt"), img_size=384)[0].grid == (32, 24, 24)
    assert not caplog.records


@pytest.mark.parametrize("file", [*V1, *V2])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 8}, r"encoder.num_heads is \d\d in the published V-JEPA.*, here 8; set num_heads="),
        ({"pred_num_heads": 8}, r"predictor.num_heads is \d\d in the published V-JEPA.*, here 8; set pred_num_heads="),
        ({"model_name": "vit_base"}, "encoder.embed_dim is .* by its weights, here 768"),
        ({"pred_depth": 24}, "predictor.depth is 12 by its weights, here 24; set pred_depth=12"),
    ],
)
def test_arguments_that_contradict_a_published_file_are_refused(file, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(weights(file), **arguments)


def test_the_giant_is_not_read_with_16_heads(caplog):
    with pytest.raises(ConfigError, match="encoder.num_heads is 22 in the published V-JEPA 2 ViT-g/16, here 16"):
        build(weights("vitg.pt"), model_name="vit_giant")
    build(weights("vitg.pt", "mine.pt"), model_name="vit_giant")  # trained by someone else with their code
    assert "encoder.num_heads is 22 in the published V-JEPA 2 ViT-g/16, here 16. Unless that is intended" in caplog.text


@pytest.mark.parametrize("file", V2)
def test_vjepa2_is_not_read_without_rotary_positions(file):
    with pytest.raises(ConfigError, match="encoder.use_rope is true in V-JEPA 2, here false"):
        build(weights(file), use_rope=False)


@pytest.mark.parametrize("file", ["vitl.pt", "vith.pt"])
def test_an_encoder_alone_that_could_be_either_is_asked_about(file):
    weights(file, with_predictor=False).check_arguments({})  # by its name
    with pytest.raises(ConfigError, match="give, as in training, use_rope=True"):
        weights(file, "mine.pt", with_predictor=False).check_arguments({})


def test_sin_cos_positions_without_a_predictor_are_assumed_to_be_used(caplog):
    weights("vitl16.pth.tar", with_predictor=False).check_arguments({})
    assert not caplog.records
    weights("vitl16.pth.tar", "mine.pt", with_predictor=False).check_arguments({})
    assert "assumed use_rope=False, by the sin-cos positions in it; give use_rope=True" in caplog.text


def test_the_content_wins_over_a_misleading_name():
    encoder, _ = build(weights("vitl16.pth.tar", "vitl.pt"))
    assert not encoder.positions.use_rope
    encoder, _ = build(weights("vitl.pt", "vitl16.pth.tar"))
    assert encoder.positions.use_rope
