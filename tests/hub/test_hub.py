"""Files of every format that users have, written here in small."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from transformers import VJEPA2Model

from tests.hub.weight_files import (
    DATA,
    ROPE,
    SIZES,
    clips,
    make,
    same_encoder,
    same_predictor,
    write_released,
    write_run,
)  # fmt: skip
from tubelet import hub
from tubelet.config import ConfigError
from tubelet.models.attentive_pooler import AttentiveClassifier
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointError, CheckpointState


@pytest.mark.parametrize(
    "section",
    [
        {},
        ROPE,
        {"use_rope": True, "use_silu": True, "pred_num_heads": 4},
        {"use_mask_tokens": False, "noise_schedule": "linear", "encoder_args": {"depth": 3, "mlp_ratio": 2.0}},
    ],
)
def test_run_folder(tmp_path, section):
    encoder, target, predictor = write_run(tmp_path, **section)
    same_encoder(hub.load_encoder(tmp_path), target)
    same_encoder(hub.load_encoder(str(tmp_path), "encoder"), encoder)
    same_encoder(hub.load_encoder(tmp_path / "checkpoints" / "step-00000007"), target)
    same_predictor(hub.load_predictor(tmp_path), predictor)


def test_run_with_encoders_of_other_names(tmp_path):
    """The objective's first encoder is loaded unless `checkpoint_key` names another part."""
    options, student, teacher, _ = make()
    parts = {"student": student.state_dict(), "teacher": teacher.state_dict(), "head": {"weight": torch.ones(3)}}
    metadata = {"config": {**options, "data": DATA}, "encoders": ["teacher", "student"]}
    checkpoint.save(tmp_path / "checkpoints", 7, CheckpointState(parts, {}, metadata), keep=2)
    same_encoder(hub.load_encoder(tmp_path), teacher)
    same_encoder(hub.load_encoder(tmp_path, "student"), student)
    with pytest.raises(ConfigError, match=r"'studnet' is not in the file\. Did you mean 'student'"):
        hub.load_encoder(tmp_path, "studnet")
    assert hub.read_parts(tmp_path).keys() == {"target_encoder", *parts}


def test_arguments_override_what_the_run_says(tmp_path):
    _, target, _ = write_run(tmp_path)
    features = hub.load_encoder(tmp_path, out_layers=[0, 1]).eval()(clips())
    assert len(features) == 2
    torch.testing.assert_close(features[1], target(clips()))
    assert hub.load_encoder(tmp_path, use_activation_checkpointing=True).use_activation_checkpointing


def test_encoder_args_extend_those_of_the_run(tmp_path):
    encoder, target, _ = write_run(tmp_path)
    loaded = hub.load_encoder(tmp_path, encoder_args={"out_layers": [1]}).eval()
    torch.testing.assert_close(loaded(clips())[0], target(clips()))
    built = hub.read(tmp_path).build_encoder({"encoder_args": {"drop_rate": 0.5}})
    assert (len(built.blocks), built.blocks[0].mlp.drop.p) == (len(encoder.blocks), 0.5)


def test_a_sharded_checkpoint_is_read_by_its_own_name_too(tmp_path):
    """As version 0.1 wrote them; also by the name of the link to the newest."""
    _, target, predictor = write_run(tmp_path)
    folder = tmp_path / "checkpoints"
    state = checkpoint.read(folder / "latest")
    sharded = folder / "step-00000010.dcp"
    dcp.save(state.weights, checkpoint_id=sharded, no_dist=True)
    torch.save(
        {"step": 10, **dict.fromkeys(state.weights, {}), "config": state.metadata["config"]}, sharded / "rest.pt"
    )
    (folder / "latest.pt").symlink_to(sharded.name)
    for path in (sharded, folder / "latest.pt", folder, tmp_path):
        same_encoder(hub.load_encoder(path), target)
        same_predictor(hub.load_predictor(path), predictor)


@pytest.mark.parametrize("uniform_power", [False, True])
def test_vjepa_file(tmp_path, uniform_power):
    path = tmp_path / "vitt16.pth.tar"
    encoder, target, predictor = write_released(path, uniform_power=uniform_power)
    arguments = {"model_name": "vit_tiny", "depth": 2, "uniform_power": uniform_power, **SIZES}
    same_encoder(hub.load_encoder(path, **arguments), target)
    same_encoder(hub.load_encoder(path, "encoder", **arguments), encoder)
    same_predictor(hub.load_predictor(path, **arguments), predictor)
    same_encoder(hub.load_encoder(path, num_heads=3), target)  # the positions tell the rest
    with pytest.raises(ConfigError, match=f"encoder.uniform_power is {str(uniform_power).lower()} by the positions"):
        hub.load_encoder(path, **{**arguments, "uniform_power": not uniform_power})
    with pytest.raises(ConfigError, match="num_frames is 4 by the positions in it, here 8; leave num_frames out"):
        hub.load_encoder(path, **{**arguments, "num_frames": 8})
    with pytest.raises(ConfigError, match="give, as in training, num_heads=…, or model_name="):
        hub.load_encoder(path)


@pytest.mark.parametrize("positions", [False, True])
def test_vjepa2_file(tmp_path, positions):
    path = tmp_path / "vitt.pt"
    _, target, predictor = write_released(path, positions=False, pred_num_heads=4, **ROPE)
    if positions:  # some released files keep unused sin-cos positions
        content = torch.load(path, weights_only=True)
        content["target_encoder"]["module.backbone.pos_embed"] = torch.randn(1, 32, 192)
        content["predictor"]["module.backbone.predictor_pos_embed"] = torch.randn(1, 32, 48)
        torch.save(content, path)
    arguments = {"model_name": "vit_tiny", "depth": 2, "use_rope": True, **SIZES}
    same_encoder(hub.load_encoder(path, **arguments), target)
    same_predictor(hub.load_predictor(path, pred_num_heads=4, **arguments), predictor)


def test_sizes_that_differ_from_training_interpolate_in_the_forward_pass(tmp_path):
    _, target, _ = write_run(tmp_path)
    x = torch.randn(1, 3, 8, 48, 48)
    torch.testing.assert_close(hub.load_encoder(tmp_path).eval()(x), target(x))


@pytest.mark.parametrize("what", ["missing", "unexpected", "shape"])
def test_keys_that_do_not_match_are_listed(tmp_path, what):
    path = tmp_path / "checkpoint.pt"
    write_released(path)
    content = torch.load(path, weights_only=True)
    state, name = content["target_encoder"], "module.backbone.blocks.1.attn.qkv.weight"
    if what == "missing":
        del state[name]
    elif what == "unexpected":
        state["module.backbone.blocks.1.attn.qkv.weight_2"] = state[name]
    else:
        state[name] = state[name][:10]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"{what}.*blocks\.[19]\.attn\.qkv\.weight"):
        hub.load_encoder(path, num_heads=3)


def test_errors_name_the_remedy(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no such file"):
        hub.load_encoder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a run folder"):
        hub.load_encoder(tmp_path / "empty")
    with pytest.raises(ConfigError, match="Did you mean 'target_encoder'"):
        hub.load_encoder(tmp_path / "run", "target_encode")
    with pytest.raises(ConfigError, match="Did you mean 'out_layers'"):
        hub.load_encoder(tmp_path / "run", out_layer=[1])
    torch.save({"weights": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="it holds weights"):
        hub.load_encoder(tmp_path / "other.pt")
    (tmp_path / "empty" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ConfigError, match="'vit', not 'vjepa2'"):
        hub.load_encoder(tmp_path / "empty")


class Harmful:
    def __reduce__(self):
        return (open, ("/dev/null",))


def test_no_code_of_a_file_is_run(tmp_path):
    torch.save({"target_encoder": {}, "x": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(CheckpointError, match="harmful.pt"):
        hub.load_encoder(tmp_path / "harmful.pt")


def test_read_parts_is_ready_for_a_new_run(tmp_path):
    encoder, target, predictor = write_released(tmp_path / "a.pth.tar")
    parts = hub.read_parts(tmp_path / "a.pth.tar")
    for name, module in (("encoder", encoder), ("target_encoder", target), ("predictor", predictor)):
        checkpoint.load_weights(module, parts[name], name)
        assert not any("pos_embed" in key for key in parts[name])


@pytest.fixture
def parts_read(monkeypatch):
    """Names of the parts that are read from checkpoints, in order."""
    names, read_weights = [], checkpoint.read_weights

    def counted(path, parts=None, **arguments):
        names.extend(parts)
        return read_weights(path, parts, **arguments)

    monkeypatch.setattr(checkpoint, "read_weights", counted)
    return names


def test_each_part_is_read_once_and_only_if_needed(tmp_path, parts_read):
    encoder, target, predictor = write_run(tmp_path / "run", **ROPE)
    hub.export(tmp_path / "run", tmp_path / "exported")
    assert sorted(parts_read) == ["predictor", "target_encoder"]
    parts_read.clear()
    weights = hub.read(tmp_path / "run")
    assert weights.facts()["encoder.use_rope"].value
    weights.normalization()
    weights.build_encoder({})
    assert parts_read == []
    same_encoder(weights.load_encoder(), target)
    same_encoder(weights.load_encoder(), target)
    same_encoder(weights.load_encoder("encoder"), encoder)
    same_predictor(weights.load_predictor(), predictor)
    assert parts_read == ["target_encoder", "encoder", "predictor"]


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/latest", "checkpoints/latest.pt"])
def test_names_of_the_newest_checkpoint(tmp_path, name):
    _, target, _ = write_run(tmp_path)
    same_encoder(hub.load_encoder(tmp_path / name), target)


def test_damaged_weights_are_not_loaded(tmp_path):
    write_run(tmp_path)
    path = tmp_path / "checkpoints" / "step-00000007" / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert hub.read(tmp_path).facts()
    with pytest.raises(CheckpointError, match="wrong checksum of weights.safetensors"):
        hub.load_encoder(tmp_path)


@pytest.mark.parametrize("mask_tokens", [True, False])
def test_export_loads_in_transformers_with_equal_outputs_and_comes_back(tmp_path, mask_tokens):
    _, target, predictor = write_run(tmp_path / "run", **ROPE, use_mask_tokens=mask_tokens, pred_num_heads=4)
    hub.export(tmp_path / "run", tmp_path / "exported")
    theirs, info = VJEPA2Model.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert all(key.startswith("predictor.") and not mask_tokens for key in info["missing_keys"])
    context, hidden = torch.arange(12).repeat(2, 1), torch.arange(12, 32).repeat(2, 1)
    with torch.no_grad():
        output = theirs.eval()(clips().transpose(1, 2), context_mask=[context], target_mask=[hidden])
        features = target(clips())
        torch.testing.assert_close(output.last_hidden_state, features, atol=1e-5, rtol=0)
        if mask_tokens:
            predicted = predictor(features[:, :12], None, context, hidden, 1)
            found = output.predictor_output.last_hidden_state
            torch.testing.assert_close(found, predicted, atol=1e-5, rtol=0)
            same_predictor(hub.load_predictor(tmp_path / "exported"), predictor)
    same_encoder(hub.load_encoder(tmp_path / "exported"), target)


def test_transformers_folder_written_by_transformers(tmp_path):
    """save_pretrained leaves out defaults, and may split the weights into several files."""
    write_run(tmp_path / "run", **ROPE)
    hub.export(tmp_path / "run", tmp_path / "exported")
    VJEPA2Model.from_pretrained(tmp_path / "exported").save_pretrained(tmp_path / "again", max_shard_size="1MB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    same_encoder(hub.load_encoder(tmp_path / "again"), hub.load_encoder(tmp_path / "run").eval())


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({}, "fixed sin-cos positions"),
        ({"use_rope": True}, "rope_pairing: interleaved"),
        ({**ROPE, "use_silu": True}, "SwiGLU"),
        ({**ROPE, "encoder_args": {"qk_scale": 0.3}}, "qk_scale"),
        ({**ROPE, "encoder_args": {"block_causal": True}}, "block_causal attention"),
        ({**ROPE, "encoder_args": {"subtract_mean_frame": True}}, "subtract_mean_frame"),
    ],
)
def test_export_refuses_what_transformers_does_not_have(tmp_path, section, reason):
    write_run(tmp_path / "run", **section)
    with pytest.raises(ConfigError, match=reason):
        hub.export(tmp_path / "run", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


TOKENS = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))


def probe(**arguments):
    return AttentiveClassifier(**{"embed_dim": 48, "num_heads": 3, "num_classes": 5, "init_std": 0.2, **arguments})


@pytest.mark.parametrize(
    "arguments", [{}, {"depth": 3, "mlp_ratio": 2.0}, {"complete_block": False, "qkv_bias": False}]
)
def test_own_probe(tmp_path, arguments):
    expected = probe(**arguments)
    torch.save({"classifier": expected.state_dict(), "config": {}, "embed_dim": 48}, tmp_path / "probe.pt")
    torch.testing.assert_close(hub.load_probe(tmp_path, num_heads=3)(TOKENS), expected(TOKENS))
    with pytest.raises(ConfigError, match="give num_heads"):
        hub.load_probe(tmp_path)


@pytest.mark.parametrize("complete_block", [True, False])
def test_released_vjepa_probe_leaves_its_projection_out(tmp_path, complete_block):
    trained = probe(complete_block=complete_block)
    state = {f"module.{name}": tensor for name, tensor in trained.state_dict().items()}
    torch.save({"classifier": state, "epoch": 20}, tmp_path / "ssv2-probe.pth.tar")
    without = probe(complete_block=complete_block, use_proj=False)
    kept = {name: tensor for name, tensor in trained.state_dict().items() if name in without.state_dict()}
    assert len(kept) == len(trained.state_dict()) - 2
    without.load_state_dict(kept)
    loaded = hub.load_probe(tmp_path / "ssv2-probe.pth.tar", num_heads=3)
    torch.testing.assert_close(loaded(TOKENS), without(TOKENS))
    with_it = hub.load_probe(tmp_path / "ssv2-probe.pth.tar", num_heads=3, use_proj=True)
    torch.testing.assert_close(with_it(TOKENS), trained(TOKENS))
    assert not torch.allclose(loaded(TOKENS), with_it(TOKENS))


def test_released_vjepa2_probes(tmp_path):
    several = [probe(depth=4, use_proj=False) for _ in range(3)]
    states = [{f"module.{name}": tensor for name, tensor in one.state_dict().items()} for one in several]
    torch.save({"classifiers": states}, tmp_path / "probes.pt")
    for index, one in enumerate(several):
        found = hub.load_probe(tmp_path / "probes.pt", num_heads=3, index=index)
        torch.testing.assert_close(found(TOKENS), one(TOKENS))
    with pytest.raises(ConfigError, match="holds 3 probes"):
        hub.load_probe(tmp_path / "probes.pt", num_heads=3)


def test_probe_errors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "probe.pt")
    with pytest.raises(CheckpointError, match="no probe in it; it holds epoch"):
        hub.load_probe(tmp_path)


def test_hubconf(tmp_path):
    """torch.hub finds entry points in the repository and passes the arguments on."""
    repository = Path(__file__).parents[2]
    _, target, _ = write_run(tmp_path)
    same_encoder(torch.hub.load(str(repository), "load_encoder", tmp_path, source="local"), target)
    built = torch.hub.load(str(repository), "vit_tiny", source="local", depth=1)
    assert (built.embed_dim, len(built.blocks)) == (192, 1)
