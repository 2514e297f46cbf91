"""Both sides of the step benchmark compute the same loss from the same weights."""

import pytest
import torch
from transformers import VJEPA2Model

from benchmarks import step
from tubelet import hub

SETTING = step.Setting(
    "vit_tiny", pred_embed_dim=96, pred_depth=2, pred_num_heads=3, batch_size=2, num_frames=4, crop_size=96
)


@pytest.fixture
def jepa():
    return step.make_jepa(SETTING)


@pytest.fixture
def vjepa2(jepa, tmp_path):
    """The model of transformers with the weights of `jepa`, through an exported checkpoint."""
    state = {part: getattr(jepa, part).state_dict() for part in ("encoder", "target_encoder", "predictor")}
    predictor = {"num_heads": jepa.predictor.num_heads, "use_rope": True, "rope_pairing": "vjepa2"}
    config = {**jepa.encoder.built_from, "objective": {"predictor": predictor}}
    torch.save({"step": 0, "optimizer": {}, "config": config, **state}, tmp_path / "step.pt")
    hub.export(tmp_path / "step.pt", tmp_path / "exported")
    return VJEPA2Model.from_pretrained(tmp_path / "exported")


def test_both_sides_compute_the_same_loss(jepa, vjepa2):
    batch = step.make_batch(SETTING)
    ours = step.our_step(SETTING, jepa)(*batch)
    peer = step.transformers_step(SETTING, vjepa2, only_context=True)(*batch)
    assert ours == pytest.approx(peer, rel=1e-4)


def test_forward_of_the_peer_encodes_the_target_tokens_too(vjepa2):
    """Therefore the benchmark also compares with layers that run on the context only."""
    clips, (context, _), (target, _) = step.make_batch(SETTING)
    videos = clips.transpose(1, 2)
    with torch.no_grad():
        by_forward = step.predict_with_forward(vjepa2, videos, context, target)
        from_context = step.predict_from_context(vjepa2, videos, context, target)
    assert by_forward.shape == from_context.shape
    assert not torch.allclose(by_forward, from_context, atol=1e-3)


def test_steps_update_all_parts(jepa):
    before = {name: p.clone() for name, p in jepa.named_parameters()}
    step.our_step(SETTING, jepa)(*step.make_batch(SETTING))
    changed = {name for name, p in jepa.named_parameters() if not torch.equal(p, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"encoder", "target_encoder", "predictor"}


def test_flops_include_the_matrix_products():
    """Lower bound: the forward pass of the target encoder, 2 FLOP for each weight and token."""
    batch = step.make_batch(SETTING)
    blocks = step.make_jepa(SETTING).encoder.blocks
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    tokens = SETTING.batch_size * 2 * 6 * 6
    lower_bound = 2 * weights * tokens
    assert lower_bound < step.flops(SETTING, batch) < 10 * lower_bound
