"""Weights are never read into an architecture in which they mean something else, without a word."""

import logging

import pytest
import torch
from transformers import VJEPA2Config, VJEPA2Model

from tests.hub.weight_files import ROPE, SIZES, clips, make, same_encoder, same_predictor, write_released, write_run
from tubelet import hub
from tubelet.config import ConfigError
from tubelet.grid import Grid
from tubelet.hub import fit, positions, published, transformers
from tubelet.hub.published import Published
from tubelet.hub.state import without_fixed_positions
from tubelet.layers.positions import sincos_2d, sincos_3d
from tubelet.runtime import checkpoint


@pytest.mark.parametrize(
    ("section", "arguments", "message"),
    [
        (
            {},
            {"uniform_power": False},
            "encoder.uniform_power is true in the configuration of its training, here false",
        ),
        ({}, {"num_heads": 6}, "encoder.num_heads is 3 .*, here 6; set num_heads=3, or leave it out"),
        ({}, {"use_rope": True}, "encoder.use_rope is false"),
        ({}, {"num_frames": 8}, "num_frames is 4 .*, here 8; leave num_frames out: the encoder takes clips of other"),
        ({}, {"img_size": (32, 48)}, r"img_size is 32 .*, here \[32, 48\]"),
        ({}, {"model_name": "vit_small"}, "encoder.embed_dim is 192 .*, here 384"),
        ({}, {"tubelet_size": 4}, "tubelet_size is 2"),
        ({"uniform_power": False}, {"uniform_power": True}, "encoder.uniform_power is false"),
        (ROPE, {"rope_pairing": "interleaved"}, "rope_pairing is vjepa2 .*, here interleaved"),
        (ROPE, {"use_rope": False}, "encoder.use_rope is true"),
        (ROPE, {"encoder": {"qk_scale": 0.3}}, "encoder.qk_scale is null .*, here 0.3"),
    ],
)
def test_arguments_that_contradict_a_run_are_refused(tmp_path, section, arguments, message):
    write_run(tmp_path, **section)
    with pytest.raises(ConfigError, match=message):
        hub.load_encoder(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("section", "arguments"),
    [
        ({}, {"uniform_power": True, "model_name": "vit_tiny", "depth": 2, **SIZES}),
        ({}, {"img_size": (32, 32), "drop_rate": 0.1, "use_activation_checkpointing": True}),
        ({}, {"rope_pairing": "vjepa2"}),  # there are no rotary positions
        (ROPE, {"uniform_power": False, "num_frames": 64, "img_size": 256}),  # rotary positions do not depend on them
    ],
)
def test_arguments_that_change_no_feature_are_taken(tmp_path, caplog, section, arguments):
    _, target, _ = write_run(tmp_path, **section)
    with caplog.at_level(logging.WARNING):
        same_encoder(hub.load_encoder(tmp_path, **arguments), target)
    assert not caplog.records


def test_what_a_run_may_change_deliberately_is_warned_of(tmp_path, caplog):
    write_run(tmp_path)
    hub.load_encoder(tmp_path, block_causal=True)
    assert "encoder.block_causal is false in the configuration of its training, here true. Unless" in caplog.text


def test_options_of_the_predictor_are_compared_where_it_is_loaded(tmp_path):
    *_, target, predictor = write_run(tmp_path, pred_num_heads=4)
    for arguments, message in (({"pred_depth": 24}, "depth is 2 .*, here 24; set pred_depth=2"),
                               ({"pred_num_heads": 3}, "num_heads is 4 .*, here 3; set pred_num_heads=4")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"predictor.{message}, or leave it out"):
            hub.load_predictor(tmp_path, **arguments)
        same_encoder(hub.load_encoder(tmp_path, **arguments), target)
    same_predictor(hub.load_predictor(tmp_path, pred_depth=2, pred_num_heads=4), predictor)


# ---------------------------------------------------------------- files that do not say it


@pytest.mark.parametrize("grid", [Grid(8, 14, 14), Grid(1, 4, 4), Grid(3, 2, 5), Grid(2, 1, 3), Grid(4, 3, 1)])
@pytest.mark.parametrize("uniform_power", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sin_cos_positions_tell_their_grid(grid, uniform_power, dtype):
    table = sincos_3d(192, grid, uniform_power)[None].to(dtype)
    assert positions.recognize(table, is_video=True) == (grid, uniform_power)
    assert positions.recognize(table + 0.05, is_video=True) is None
    assert positions.recognize(torch.randn(1, 24, 192), is_video=True) is None


def test_sin_cos_positions_of_images_tell_their_grid():
    table = sincos_2d(192, Grid(1, 4, 7))[None]
    assert positions.recognize(table, is_video=False) == (Grid(1, 4, 7), False)


@pytest.mark.parametrize("uniform_power", [False, True])
def test_vjepa_files_tell_the_kind_and_the_sizes_by_their_positions(tmp_path, uniform_power):
    path = tmp_path / "any.pth.tar"
    _, target, predictor = write_released(path, uniform_power=uniform_power)
    same_encoder(hub.load_encoder(path, num_heads=3), target)
    same_predictor(hub.load_predictor(path, num_heads=3), predictor)
    with pytest.raises(ConfigError, match="encoder.use_rope is false by the sin-cos positions in it, here true"):
        hub.load_encoder(path, num_heads=3, use_rope=True)


def test_vjepa2_files_are_never_read_with_another_pairing(tmp_path):
    path = tmp_path / "any.pt"
    write_released(path, positions=False, **ROPE)
    with pytest.raises(ConfigError, match="rope_pairing is vjepa2 in V-JEPA 2's code, here interleaved"):
        hub.load_encoder(path, num_heads=3, use_rope=True, rope_pairing="interleaved")


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ({}, "num_heads=…, or model_name='vit_large', …; use_rope=True for rotary positions"),
        ({"num_heads": 3}, "give, as in training, use_rope=True for rotary positions"),
        ({"num_heads": 3, "use_rope": False}, "give, as in training, img_size=…; num_frames=…; uniform_power="),
        ({"num_heads": 3, "use_rope": False, **SIZES}, "give, as in training, uniform_power=True or False"),
    ],
)
def test_what_the_weights_do_not_tell_is_asked_for(tmp_path, given, asked):
    _, target, _ = write_released(tmp_path / "any.pt", positions=False)
    with pytest.raises(ConfigError, match=asked):
        hub.load_encoder(tmp_path / "any.pt", **given)
    complete = {"num_heads": 3, "use_rope": False, "uniform_power": True, **SIZES}
    same_encoder(hub.load_encoder(tmp_path / "any.pt", **complete), target)


def write_vjepa2(path, **config):
    """A file as V-JEPA 2 releases them, from a model of transformers, and that model."""
    config = {
        "crop_size": 64, "frames_per_clip": 8, "hidden_size": 96, "num_attention_heads": 3, "num_hidden_layers": 2,
        "pred_hidden_size": 48, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 3, "initializer_range": 0.1,
        **config,
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = VJEPA2Model(VJEPA2Config(**config)).eval()
    parts = {}
    for part in ("encoder", "predictor"):
        state = transformers.to_tubelet(theirs.state_dict(), part, path)
        parts[part] = {f"module.backbone.{name}": tensor.clone() for name, tensor in state.items()}
    parts["encoder"]["module.backbone.pos_embed"] = sincos_3d(96, Grid(4, 4, 4), True)[None]  # not used
    torch.save({**parts, "target_encoder": parts["encoder"], "epoch": 1, "opt": {}}, path)
    return theirs


def same_as_transformers(path, theirs, **arguments):
    x = torch.randn(2, 3, 8, 64, 64)
    context, hidden = torch.arange(30).repeat(2, 1), torch.arange(30, 64).repeat(2, 1)
    with torch.no_grad():
        output = theirs(x.transpose(1, 2), context_mask=[context], target_mask=[hidden])
        features = hub.load_encoder(path, **arguments).eval()(x)
        torch.testing.assert_close(features, output.last_hidden_state, atol=1e-4, rtol=1e-4)
        pred_num_heads = {"pred_num_heads": 2} if arguments else {}
        predictor = hub.load_predictor(path, **arguments, **pred_num_heads).eval()
        # transformers takes mask token 1
        found = predictor(features[:, :30], None, context, hidden, 1)
        torch.testing.assert_close(found, output.predictor_output.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_a_vjepa2_file_equals_transformers(tmp_path):
    """Ten mask tokens tell that the positions are rotary; those that are stored tell the size of the clips."""
    theirs = write_vjepa2(tmp_path / "any.pt")
    same_as_transformers(tmp_path / "any.pt", theirs, num_heads=3)


def test_a_published_file_needs_no_arguments(tmp_path, monkeypatch, caplog):
    tiny = Published("tiny.pt", "V-JEPA 2", "ViT-tiny", 96, 2, 3, 2, 64, 8)
    monkeypatch.setattr(published, "PUBLISHED", (tiny,))
    monkeypatch.setattr("tubelet.hub.released.PRED_WIDTH", 48)
    theirs = write_vjepa2(tmp_path / "tiny.pt")
    with caplog.at_level(logging.WARNING):
        same_as_transformers(tmp_path / "tiny.pt", theirs)
    assert not caplog.records
    with pytest.raises(ConfigError, match="encoder.num_heads is 3 in the published V-JEPA 2 ViT-tiny, here 6"):
        hub.load_encoder(tmp_path / "tiny.pt", num_heads=6)
    with pytest.raises(ConfigError, match="predictor.num_heads is 2 in the published V-JEPA 2 ViT-tiny, here 3"):
        hub.load_predictor(tmp_path / "tiny.pt", pred_num_heads=3)
    (tmp_path / "tiny.pt").rename(tmp_path / "renamed.pt")
    same_as_transformers(tmp_path / "renamed.pt", theirs)
    hub.load_encoder(tmp_path / "renamed.pt", num_heads=6)
    assert "num_heads is 3 in the published V-JEPA 2 ViT-tiny, here 6. Unless that is intended" in caplog.text


# ---------------------------------------------------------------- init_from


def new_modules(**section):
    _, encoder, target, predictor = make(**section)
    return {"encoder": encoder, "target_encoder": target, "predictor": predictor}


def load_all(path, modules):
    for name, state in hub.read_parts(path, modules).items():
        checkpoint.load_weights(modules[name], state, name)


@pytest.mark.parametrize(
    ("stored", "new", "message"),
    [
        ({}, {"encoder_args": {"num_heads": 6}}, "encoder.num_heads is 3 .*, here 6; set encoder.num_heads=3"),
        ({}, {"use_rope": True}, "encoder.use_rope is false .*; set encoder.use_rope=false"),
        ({}, {"uniform_power": False}, "encoder.uniform_power is true .*; set encoder.uniform_power=true"),
        (ROPE, {"use_rope": True}, "rope_pairing is vjepa2 .*; set encoder.rope_pairing=vjepa2"),
        ({}, {"pred_num_heads": 4}, "predictor.num_heads is 3 .*, here 4; set objective.predictor.num_heads=3"),
        ({}, {"pred_depth": 3}, "predictor.depth is 2 .*, here 3; set objective.predictor.depth=2$"),
        ({}, {"encoder_args": {"depth": 3}}, "encoder.depth is 2 .*, here 3; set encoder.depth=2$"),
        ({}, {"use_mask_tokens": False}, "set objective.predictor.use_mask_tokens=true"),
    ],
)
@pytest.mark.parametrize("write", [write_run, write_released])
def test_weights_of_another_architecture_start_no_run(tmp_path, caplog, stored, new, message, write):
    write(tmp_path / "a", **stored, **({"positions": not stored} if write is write_released else {}))
    if write is write_released and "num_heads" in message:
        hub.read_parts(tmp_path / "a", new_modules(**new))  # no shape tells it, and no published model has this size
        assert "does not say with which options it was trained; assumed encoder.num_heads=" in caplog.text
        return
    with pytest.raises(ConfigError, match=message):
        hub.read_parts(tmp_path / "a", new_modules(**new))


def test_a_pairing_that_is_not_used_does_not_matter(tmp_path):
    _, target, _ = write_released(tmp_path / "any.pt", positions=False)
    modules = new_modules(rope_pairing="interleaved")
    load_all(tmp_path / "any.pt", modules)
    same_encoder(modules["target_encoder"], target)


@pytest.mark.parametrize("section", [{}, ROPE, {"uniform_power": False, "pred_num_heads": 4}])
def test_weights_of_the_same_architecture_start_a_run(tmp_path, section, caplog):
    _, target, predictor = write_run(tmp_path, **section)
    modules = new_modules(**section)
    with caplog.at_level(logging.WARNING):
        load_all(tmp_path, modules)
    assert not caplog.records
    same_encoder(modules["target_encoder"], target)
    same_predictor(modules["predictor"], predictor)


def test_a_folder_of_transformers_starts_no_run_with_another_pairing(tmp_path):
    write_run(tmp_path / "run", **ROPE)
    hub.export(tmp_path / "run", tmp_path / "exported")
    load_all(tmp_path / "exported", new_modules(**ROPE))
    with pytest.raises(ConfigError, match="set encoder.rope_pairing=vjepa2"):
        hub.read_parts(tmp_path / "exported", new_modules(use_rope=True))


def test_mask_tokens_that_are_too_many_are_left_out(tmp_path, caplog):
    write_vjepa2(tmp_path / "any.pt")
    modules = new_modules(**ROPE)
    state = hub.read(tmp_path / "any.pt").part("predictor")
    kept = fit.adapt(without_fixed_positions(state), modules["predictor"], "any.pt")
    assert [name for name in kept if "mask" in name] == ["mask_tokens.0", "mask_tokens.1"]
    assert "of the 10 mask tokens of its predictor, the first 2 are used" in caplog.text
    with pytest.raises(ConfigError, match=r"has 1 mask token.*this run's has 2; set `mask` to a list of 1"):
        fit.adapt({"mask_tokens.0": torch.ones(1)}, modules["predictor"], "any.pt")


def test_the_predictor_of_vjepa2_ac_is_named(tmp_path):
    theirs = write_vjepa2(tmp_path / "any.pt")
    content = torch.load(tmp_path / "any.pt", weights_only=True)
    content["predictor"] = {"module.action_encoder.weight": torch.ones(4, 7)}
    torch.save(content, tmp_path / "ac.pt")
    x = torch.randn(1, 3, 8, 64, 64)
    with torch.no_grad():
        features = hub.load_encoder(tmp_path / "ac.pt", num_heads=3).eval()(x)
        expected = theirs(x.transpose(1, 2), skip_predictor=True).last_hidden_state
    torch.testing.assert_close(features, expected, atol=1e-4, rtol=1e-4)
    for read in (hub.load_predictor, lambda path, **_: hub.read_parts(path, new_modules(**ROPE))):
        with pytest.raises((ConfigError, checkpoint.CheckpointError), match=r"V-JEPA 2-AC|embed_dim"):
            read(tmp_path / "ac.pt", num_heads=3)


def test_another_normalization_is_warned_of(tmp_path, caplog):
    write_run(tmp_path)
    weights = hub.read(tmp_path)
    weights.config["data_aug"] = {"normalize_mean": [0.5, 0.5, 0.5], "normalize_std": [0.2, 0.2, 0.2]}
    hub.check_normalization(weights, {"normalize_mean": (0.5, 0.5, 0.5)})
    assert not caplog.records
    hub.check_normalization(weights, {"normalize_mean": (0.485, 0.456, 0.406)})
    assert "data_aug.normalize_mean is [0.5, 0.5, 0.5] in the training of the weights, here [0.485" in caplog.text


def test_clips_of_another_size_are_warned_of(tmp_path, caplog):
    write_run(tmp_path)
    modules = new_modules()
    modules["encoder"].built_from["clip"]["num_frames"] = 16
    hub.read_parts(tmp_path, {"encoder": modules["encoder"]})
    assert "sizes.num_frames is 4 in the configuration of its training, here 16" in caplog.text
    assert clips().shape[2] == 4
