import pytest
import torch
import torch.nn.functional as F

from tubelet.models.attentive_pooler import AttentiveClassifier
from tubelet.probing import heads
from tubelet.training.optimizer import adamw

WIDTH, CLASSES = 24, 5


def attentive(depth=1, **arguments):
    return AttentiveClassifier(embed_dim=WIDTH, num_heads=4, depth=depth, num_classes=CLASSES, **arguments)


def linear():
    return heads.LinearHead(torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH), CLASSES)


KINDS = {
    "one block": attentive,
    "one block, no projection": lambda: attentive(use_proj=False),
    "one block, no bias": lambda: attentive(qkv_bias=False),
    "attention only": lambda: attentive(complete_block=False),
    "two blocks": lambda: attentive(depth=2),
    "linear": linear,
}


def shaken(module):
    """Away from the initialisation, where biases are zero and norms do nothing."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_heads_together_give_each_heads_own_logits_and_gradients(kind):
    torch.manual_seed(0)
    together = heads.Heads([shaken(KINDS[kind]()) for _ in range(3)])
    tokens = torch.randn(2, 7, WIDTH)
    weights = torch.randn(3, 2, CLASSES)

    (together(tokens) * weights).sum().backward()
    gradients = [parameter.grad.clone() for parameter in together.parameters()]
    together.zero_grad()
    each = torch.stack([head(tokens) for head in together.heads])
    (each * weights).sum().backward()

    torch.testing.assert_close(together(tokens), each, atol=1e-5, rtol=1e-5)
    for (name, parameter), gradient in zip(together.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ["one block", "two blocks", "linear"])
def test_a_head_learns_the_same_beside_others_as_alone(kind):
    grid = [(1e-3, 0.0), (1e-2, 0.1), (3e-3, 0.5)]
    tokens, labels = torch.randn(10, 6, 1, 1, 7, WIDTH), torch.randint(0, CLASSES, (10, 6))

    def trained(grid):
        together = heads.build(KINDS[kind], len(grid), seed=3)
        optimizers = [adamw([h], lr=lr, weight_decay=wd) for h, (lr, wd) in zip(together.heads, grid, strict=True)]
        for x, y in zip(tokens, labels, strict=True):
            heads.loss(heads.read_out(together, x, True), y).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return together

    beside = trained(grid)
    for place, settings in enumerate(grid):
        alone = trained([settings])
        x = tokens[:, :, 0, 0].flatten(0, 1)
        torch.testing.assert_close(beside(x)[place], alone(x)[0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(beside(x)[0], beside(x)[1], atol=1e-3)


def test_heads_start_alike_and_from_the_seed_alone():
    first, second = heads.build(attentive, 2, seed=1).heads
    torch.rand(5)
    again = heads.build(attentive, 1, seed=1).heads[0]
    other = heads.build(attentive, 1, seed=2).heads[0]
    for a, b, c in zip(first.parameters(), second.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert not torch.equal(first.linear.weight, other.linear.weight)


def test_reading_out_as_one_video_after_another():
    """Segments concatenated before the pooler, or a prediction each; probabilities averaged over views (V-JEPA)."""
    head = shaken(attentive())
    tokens = torch.randn(3, 4, 2, 5, WIDTH)  # 3 videos, 4 segments, 2 views
    labels = torch.tensor([0, 4, 2])
    for across in (True, False):
        logits = heads.read_out(heads.Heads([head]), tokens, across)
        probabilities, losses = [], []
        for video, label in zip(tokens, labels, strict=True):
            if across:
                inputs = [torch.cat([video[segment, view] for segment in range(4)]) for view in range(2)]
            else:
                inputs = [video[segment, view] for segment in range(4) for view in range(2)]
            outputs = [head(x[None])[0] for x in inputs]
            probabilities.append(sum(output.softmax(0) for output in outputs) / len(outputs))
            losses.append(sum(F.cross_entropy(output, label) for output in outputs) / len(outputs))
        torch.testing.assert_close(heads.probabilities(logits)[0], torch.stack(probabilities))
        torch.testing.assert_close(heads.loss(logits, labels)[0], sum(losses) / 3)


def test_the_linear_head_reads_the_standardised_mean_token():
    tokens = torch.randn(2, 7, WIDTH)
    head = linear()
    by_hand = [(token.mean(0) - head.mean) / head.std @ head.linear.weight.T + head.linear.bias for token in tokens]
    torch.testing.assert_close(head(tokens), torch.stack(by_hand))
