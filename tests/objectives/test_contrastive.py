import math

import pytest
import torch
from torch import nn

from tests import processes
from tubelet.objectives.losses.contrastive import ContrastiveLoss
from tubelet.objectives.losses.retrieval import retrieval_metrics


def pairs(count=6, dim=5):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, dim, generator=generator).requires_grad_() for _ in range(2)]


def test_loss_equals_a_loop():
    first, second = pairs()
    loss = ContrastiveLoss(0.1)
    expected = 0.0
    for queries, keys in ((first, second), (second, first)):
        for i, query in enumerate(queries):
            similarities = [nn.functional.cosine_similarity(query, key, dim=0).item() / 0.1 for key in keys]
            expected -= similarities[i] - math.log(sum(math.exp(s) for s in similarities))
    assert loss(first, second).item() == pytest.approx(expected / 12, rel=1e-5)


def test_temperature_is_learned_up_to_a_limit():
    first, second = pairs()
    loss = ContrastiveLoss(0.1)
    loss(first, second).backward()
    assert loss.log_scale.grad.abs() > 0
    limit, beyond = ContrastiveLoss(1 / 100), ContrastiveLoss(1 / 500)
    torch.testing.assert_close(beyond(first, second), limit(first, second))


def compare_with_one_process(expected, world):
    value, gradients = expected
    first, second = pairs()
    part = slice(3 * world.rank, 3 * world.rank + 3)
    loss = ContrastiveLoss(0.1)
    result = loss(first[part], second[part])
    assert result.item() == pytest.approx(value, rel=1e-5)
    result.backward()
    for tensor, gradient in zip((first, second), gradients[:2], strict=True):
        torch.testing.assert_close(world.mean(tensor.grad), gradient, atol=1e-6, rtol=1e-4)
    assert world.mean(loss.log_scale.grad).item() == pytest.approx(gradients[2].item(), rel=1e-4)


def test_two_processes_equal_one():
    first, second = pairs()
    loss = ContrastiveLoss(0.1)
    value = loss(first, second)
    value.backward()
    gradients = (first.grad, second.grad, loss.log_scale.grad)
    processes.run(compare_with_one_process, (value.item(), gradients), 2)


def test_retrieval_metrics_equal_sorting():
    generator = torch.Generator().manual_seed(0)
    videos = torch.randn(12, 4, generator=generator)
    video_of_text = torch.tensor([i % 12 for i in range(30)])
    texts = videos[video_of_text] + 0.8 * torch.randn(30, 4, generator=generator)
    found = retrieval_metrics(videos, texts, video_of_text)

    cosine = nn.functional.cosine_similarity(texts[:, None].double(), videos[None].double(), dim=-1)
    ranks = [cosine[m].argsort(descending=True).tolist().index(v) + 1 for m, v in enumerate(video_of_text.tolist())]
    assert found["text_to_video_r5"] == pytest.approx(100 * sum(rank <= 5 for rank in ranks) / 30)
    assert found["text_to_video_median_rank"] == sorted(ranks)[14]
    best = []
    for v in range(12):
        own = [m for m in range(30) if video_of_text[m] == v]
        others = [m for m in range(30) if video_of_text[m] != v]
        best.append(1 + sum(bool(cosine[m, v] > max(cosine[o, v] for o in own)) for m in others))
    assert found["video_to_text_r1"] == pytest.approx(100 * sum(rank == 1 for rank in best) / 12)
    assert found["video_to_text_median_rank"] == sorted(best)[5]


def test_constant_embeddings_have_chance_level():
    found = retrieval_metrics(torch.ones(100, 3), torch.ones(100, 3), torch.arange(100))
    assert found["text_to_video_r10"] == 0
    assert found["text_to_video_median_rank"] == found["video_to_text_median_rank"] == 50.5
