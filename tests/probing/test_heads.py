import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file

from tubelet import hub
from tubelet.probing import head_file, heads
from tubelet.probing.heads.attentive import AttentiveHead
from tubelet.probing.heads.knn import NearestNeighborsHead
from tubelet.probing.heads.linear import LinearHead
from tubelet.probing.heads.linear_slots import LinearSlotsHead
from tubelet.runtime.checkpoint import CheckpointError
from tubelet.training.optimizer import adamw

WIDTH, CLASSES, SLOTS = 24, 5, 3
ENCODER = SimpleNamespace(embed_dim=WIDTH, num_heads=3)


def attentive(depth=1, **arguments):
    return AttentiveHead(embed_dim=WIDTH, num_heads=4, depth=depth, num_classes=CLASSES, **arguments)


def linear():
    head = LinearHead(WIDTH, CLASSES)
    head.set_statistics(torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH))
    return head


def linear_slots():
    head = LinearSlotsHead(WIDTH, CLASSES, SLOTS)
    head.set_statistics(torch.linspace(-1, 1, SLOTS * WIDTH), torch.linspace(0.5, 2, SLOTS * WIDTH))
    return head


KINDS = {
    "one block": attentive,
    "one block, no projection": lambda: attentive(use_proj=False),
    "one block, no bias": lambda: attentive(qkv_bias=False),
    "attention only": lambda: attentive(complete_block=False),
    "two blocks": lambda: attentive(depth=2),
    "linear": linear,
    "linear slots": linear_slots,
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
    tokens = torch.randn(2, 2 * SLOTS, WIDTH)
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


def test_linear_slots_reads_the_standardized_means_of_the_time_slots_in_their_order():
    tokens = torch.randn(2, SLOTS * 4, WIDTH)  # time-major: the first 4 tokens are those of the first slot
    head = linear_slots()
    expected = []
    for clip in tokens:
        means = torch.cat([clip[4 * slot : 4 * slot + 4].mean(0) for slot in range(SLOTS)])
        expected.append(head.linear((means - head.mean) / head.std))
    torch.testing.assert_close(head(tokens), torch.stack(expected))
    reversed_time = tokens.unflatten(1, (SLOTS, 4)).flip(1).flatten(1, 2)
    assert not torch.allclose(head(reversed_time), head(tokens), atol=1e-2)


@pytest.mark.parametrize("across", [True, False])
def test_the_slots_of_all_segments_of_a_prediction_are_concatenated(across):
    tokens = torch.randn(2, 4, 2, SLOTS * 5, WIDTH)  # 2 videos, 4 segments, 2 views
    head = LinearSlotsHead(WIDTH, CLASSES, SLOTS * (4 if across else 1))
    logits = heads.read_out(heads.Heads([head]), tokens, across)[0]
    for video, predictions in zip(tokens, logits, strict=True):
        means = video.unflatten(2, (SLOTS, 5)).mean(3)  # [segments, views, slots, D]
        if across:
            inputs = [torch.cat([means[segment, view].flatten() for segment in range(4)]) for view in range(2)]
        else:
            inputs = [means[segment, view].flatten() for segment in range(4) for view in range(2)]
        torch.testing.assert_close(predictions, torch.stack([head.linear(x) for x in inputs]))


@pytest.mark.parametrize(("kind", "kept"), [("linear", 1), ("linear slots", SLOTS)])
def test_heads_that_read_means_give_the_same_for_tokens_and_for_means(kind, kept):
    tokens = torch.randn(3, 2, 1, 5 * SLOTS, WIDTH)
    together = heads.Heads([perturbed(KINDS[kind]())])
    expected = heads.read_out(together, tokens, False)
    torch.testing.assert_close(heads.read_out(together, heads.pool(tokens, kept), False), expected)


def vote(bank, labels, query, k, temperature):
    """Votes of the k nearest neighbors as fractions, by loops."""
    mean = sum(bank) / len(bank)

    def cosine(a, b):
        return float(a @ b / (a @ a).sqrt() / (b @ b).sqrt())

    neighbors = sorted(((cosine(x - mean, query - mean), y) for x, y in zip(bank, labels, strict=True)), reverse=True)
    votes = [0.0] * CLASSES
    for similarity, label in neighbors[:k]:
        votes[label] += math.exp(similarity / temperature)
    return torch.tensor(votes) / sum(votes)


@pytest.mark.parametrize("k", [1, 4, 100])
def test_nearest_neighbors_vote_as_in_dino(k):
    tokens, queries = torch.randn(30, 7, WIDTH) + 3, torch.randn(6, 7, WIDTH) + 3
    labels = torch.randint(0, CLASSES, (30,))
    head = NearestNeighborsHead(WIDTH, CLASSES, k=[k], temperature=0.2)
    head.fit(tokens, labels)
    expected = [vote(tokens.mean(1), labels.tolist(), query.mean(0), k, 0.2) for query in queries]
    torch.testing.assert_close(head(queries).exp(), torch.stack(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(heads.probabilities(head(queries)[None, :, None])[0], torch.stack(expected))


def test_nearest_neighbors_in_a_file(tmp_path):
    head = heads.build_head({"name": "knn", "k": [3], "temperature": 0.1}, ENCODER, CLASSES)
    head.fit(torch.randn(9, 1, WIDTH), torch.arange(9) % CLASSES)
    head.built_from["num_samples"] = 9
    head_file.write(tmp_path / head_file.NAME, head, {})
    tokens = torch.randn(2, 7, WIDTH)
    assert torch.equal(hub.load_probe(tmp_path)(tokens), head(tokens))


@pytest.mark.parametrize("options", [{"k": []}, {"k": [0]}, {"temperature": 0.0}, {"num_samples": 3}])
def test_impossible_neighbors_are_an_error(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        heads.HEADS.parse({"name": "knn", **options})


@pytest.mark.parametrize(
    "kind", [{"name": "attentive", "num_probe_blocks": 2, "num_heads": 4}, "attentive", "linear", "linear_slots"]
)
def test_a_head_in_a_file_is_built_again_from_its_options(kind, tmp_path):
    head = perturbed(heads.build_head(kind, ENCODER, CLASSES, num_slots=SLOTS))
    head_file.write(tmp_path / head_file.NAME, head, {})
    tokens = torch.randn(2, 2 * SLOTS, WIDTH)
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
