from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file

from tubelet import hub
from tubelet.probing import head_file, heads
from tubelet.probing.heads.attentive import AttentiveHead
from tubelet.probing.heads.linear import LinearHead
from tubelet.runtime.checkpoint import CheckpointError
from tubelet.training.optimizer import adamw

WIDTH, CLASSES = 24, 5
ENCODER = SimpleNamespace(embed_dim=WIDTH, num_heads=3)


def attentive(depth=1, **arguments):
    return AttentiveHead(embed_dim=WIDTH, num_heads=4, depth=depth, num_classes=CLASSES, **arguments)


def linear():
    head = LinearHead(WIDTH, CLASSES)
    head.set_statistics(torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH))
    return head


KINDS = {
    "one block": attentive,
    "one block, no projection": lambda: attentive(use_proj=False),
    "one block, no bias": lambda: attentive(qkv_bias=False),
    "attention only": lambda: attentive(complete_block=False),
    "two blocks": lambda: attentive(depth=2),
    "linear": linear,
}


def perturbed(module):
    """Move away from the initialization, where biases are zero and norms have no effect."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_heads_side_by_side_have_the_logits_and_gradients_of_each(kind):
    torch.manual_seed(0)
    together = heads.Heads([perturbed(KINDS[kind]()) for _ in range(3)])
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
def test_a_head_is_trained_alike_alone_and_beside_others(kind):
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


def test_predictions_equal_those_of_one_video_at_a_time():
    """Segments are concatenated or have a prediction each; probabilities are averaged over views, as in V-JEPA."""
    head = perturbed(attentive())
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


def test_the_linear_head_reads_the_standardized_mean_token():
    tokens = torch.randn(2, 7, WIDTH)
    head = linear()
    by_hand = [(token.mean(0) - head.mean) / head.std @ head.linear.weight.T + head.linear.bias for token in tokens]
    torch.testing.assert_close(head(tokens), torch.stack(by_hand))


@pytest.mark.parametrize("kind", [{"name": "attentive", "num_probe_blocks": 2, "num_heads": 4}, "attentive", "linear"])
def test_a_head_in_a_file_is_built_again_from_its_options(kind, tmp_path):
    head = perturbed(heads.build_head(kind, ENCODER, CLASSES))
    head_file.write(tmp_path / head_file.NAME, head, {})
    tokens = torch.randn(2, 7, WIDTH)
    assert torch.equal(hub.load_probe(tmp_path)(tokens), head(tokens))
    assert torch.equal(hub.load_probe(tmp_path / head_file.NAME)(tokens), head(tokens))


def test_a_damaged_file_or_one_without_a_head_is_named(tmp_path):
    path = tmp_path / head_file.NAME
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="probe.safetensors: damaged"):
        hub.load_probe(tmp_path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no probe in it; it holds weight"):
        hub.load_probe(tmp_path)


def test_a_head_of_ones_own_is_found_by_its_dotted_name(tmp_path, monkeypatch):
    """One file: selected by name, with its options; read from the file of the probe again."""
    (tmp_path / "my_heads.py").write_text(
        "import functools, torch\n"
        "from tubelet.probing.heads import Head\n"
        "class MaxHead(Head):\n"
        "    def __init__(self, embed_dim: int, num_classes: int, scale: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.scale, self.linear = scale, torch.nn.Linear(embed_dim, num_classes)\n"
        "    def forward(self, tokens):\n"
        "        return self.linear(tokens.amax(1)) * self.scale\n"
        "max_head = functools.partial(MaxHead)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    head = heads.build_head({"name": "my_heads.max_head", "scale": 2.0}, ENCODER, CLASSES)
    assert head.scale == 2.0
    tokens = torch.randn(2, 7, WIDTH)
    torch.testing.assert_close(heads.Heads([head, head])(tokens), torch.stack([head(tokens)] * 2))
    head_file.write(tmp_path / head_file.NAME, head, {})
    assert torch.equal(hub.load_probe(tmp_path)(tokens), head(tokens))
    with pytest.raises(ValidationError, match="scales"):
        heads.HEADS.parse({"name": "my_heads.max_head", "scales": 2.0})
