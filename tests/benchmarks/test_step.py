"""The peer's step is the same step: the same loss from the same weights."""

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
    """transformers' model with the weights of `jepa`, by way of a checkpoint and its export."""
    state = {part: getattr(jepa, part).state_dict() for part in ("encoder", "target_encoder", "predictor")}
    config = {"model": step.model_config(SETTING).model_dump(mode="json"), "data": SETTING.sizes}
    torch.save({"step": 0, "optimizer": {}, "config": config, **state}, tmp_path / "step.pt")
    hub.export(tmp_path / "step.pt", tmp_path / "exported")
    return VJEPA2Model.from_pretrained(tmp_path / "exported")


def test_both_sides_do_the_same_step(jepa, vjepa2):
    batch = step.make_batch(SETTING)
    ours = step.our_step(SETTING, jepa)(*batch)
    peer = step.transformers_step(SETTING, vjepa2, only_context=True)(*batch)
    assert ours == pytest.approx(peer, rel=1e-4)


def test_the_peers_forward_lets_its_encoder_see_the_targets(vjepa2):
    """Why the benchmark holds the second way of writing it against us too."""
    clips, (context, _), (target, _) = step.make_batch(SETTING)
    videos = clips.transpose(1, 2)
    with torch.no_grad():
        by_forward = step.predict_with_forward(vjepa2, videos, context, target)
        from_context = step.predict_from_context(vjepa2, videos, context, target)
    assert by_forward.shape == from_context.shape
    assert not torch.allclose(by_forward, from_context, atol=1e-3)


def test_steps_change_the_weights_and_move_the_target(jepa):
    before = {name: p.clone() for name, p in jepa.named_parameters()}
    step.our_step(SETTING, jepa)(*step.make_batch(SETTING))
    changed = {name for name, p in jepa.named_parameters() if not torch.equal(p, before[name])}
    assert {name.partition(".")[0] for name in changed} == {"encoder", "target_encoder", "predictor"}


def test_flops_count_the_matrix_products():
    """A bound from below: the target encoder's forward alone, 2 FLOP for each weight of a block and token."""
    batch = step.make_batch(SETTING)
    blocks = step.make_jepa(SETTING).encoder.blocks
    weights = sum(p.numel() for p in blocks.parameters() if p.ndim == 2)
    tokens = SETTING.batch_size * 2 * 6 * 6
    least = 2 * weights * tokens
    assert least < step.flops(SETTING, batch) < 10 * least
