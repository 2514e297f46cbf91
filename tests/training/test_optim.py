import torch
from torch import nn

from tubelet.training.optim import adamw, set_hyperparameters


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
