import copy
import math
import re

import pytest
import torch
from torch import nn

from tubelet.models import ENCODERS
from tubelet.training.optimizer import adamw, clip_gradients, layer_decay, set_hyperparameters


def test_biases_and_vectors_are_not_decayed():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[0].weight.data.fill_(1.0)
    optimizer = adamw([model], lr=0.1, weight_decay=0.5)
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    weight, bias, scale, shift = model.parameters()
    torch.testing.assert_close(weight, before[0] * (1 - 0.1 * 0.5))
    for parameter, old in zip((bias, scale, shift), before[1:], strict=True):
        assert torch.equal(parameter, old)


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert sum(len(group["params"]) for group in adamw([model], lr=1, weight_decay=0).param_groups) == 1


def test_undecayed_group_survives_a_state_dict():
    model = nn.Linear(2, 2)
    saved = adamw([model], lr=1.0, weight_decay=0.1).state_dict()
    optimizer = adamw([model], lr=1.0, weight_decay=0.1)
    optimizer.load_state_dict(saved)
    set_hyperparameters(optimizer, lr=2.0, weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize("name", ["vision_transformer.vit_tiny", "timesformer.timesformer_tiny", "vivit.vivit_tiny"])
def test_rates_fall_from_block_to_block(name):
    """Against BEiT's listing: embedding 0, block i is i + 1, all after them depth + 1."""
    file, factory = name.split(".")
    encoder = ENCODERS.find(factory, file)(img_size=32, num_frames=4, depth=3, embed_dim=24)
    head = nn.Linear(24, 5)
    optimizer = adamw([encoder, head], lr=1.0, weight_decay=0.1, lr_scales=layer_decay(encoder, 0.5))
    set_hyperparameters(optimizer, lr=2.0, weight_decay=0.3)
    found = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    named = [*encoder.named_parameters(), *((f"head.{name}", p) for name, p in head.named_parameters())]
    assert len(found) == len(named)
    for name, parameter in named:
        if block := re.match(r"blocks\.(\d+)\.", name):
            layer = int(block[1]) + 1
        elif re.match(r"(patch_embed|positions|time_positions|cls_token)", name):
            layer = 0
        else:
            assert re.match(r"(norm|head)\.", name), name
            layer = 4
        decayed = parameter.ndim > 1 and not name.endswith("bias")
        assert found[parameter] == (2.0 * 0.5 ** (4 - layer), 0.3 if decayed else 0.0), name


def test_an_encoder_without_blocks_has_no_rates_that_fall():
    with pytest.raises(ValueError, match="Linear has no `blocks`"):
        layer_decay(nn.Linear(2, 2), 0.5)


@pytest.mark.parametrize("separately", [False, True])
@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf])
def test_clipped_gradients_are_those_of_torch(separately, max_norm):
    torch.manual_seed(0)
    models = [nn.Linear(3, 4), nn.Linear(4, 2)]
    models[1](models[0](torch.randn(5, 3))).square().sum().backward()
    expected = copy.deepcopy(models)
    for model, other in zip(models, expected, strict=True):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.grad = p.grad.clone()
    groups, others = ([list(model.parameters()) for model in each] for each in (models, expected))
    norm = clip_gradients(groups, max_norm, separately=separately)
    everything = [p for group in others for p in group]
    torch.testing.assert_close(norm, torch.stack([p.grad.norm() for p in everything]).norm())
    for group in others if separately else [everything]:
        torch.nn.utils.clip_grad_norm_(group, max_norm)
    for p, q in zip((p for group in groups for p in group), everything, strict=True):
        torch.testing.assert_close(p.grad, q.grad)
