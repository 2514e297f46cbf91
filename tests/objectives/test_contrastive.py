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


# (video, text) of each pair; text 3 is one of video 0, too, because of the first pair, as is text 4 of video 7
NUMBERS = torch.tensor([[0, 3], [0, 5], [7, 3], [1, 4], [7, 4], [2, 6]]).unbind(1)


def test_partners_in_other_pairs_are_no_negatives():
    """Loss and gradients equal those of a loop over the pairs in double precision."""
    first, second = pairs()
    loss = ContrastiveLoss(0.1)
    value = loss(first, second, NUMBERS)
    value.backward()

    doubles = [x.detach().double().requires_grad_() for x in (first, second)]
    numbers = [x.tolist() for x in NUMBERS]
    partners = set(zip(*numbers, strict=True))
    terms = []
    for i in range(6):
        for way in (0, 1):
            own = (doubles[way][i], numbers[way][i])
            exponentials = {}
            for j in range(6):
                other = (doubles[1 - way][j], numbers[1 - way][j])
                video, text = (own[1], other[1]) if way == 0 else (other[1], own[1])
                if i == j or (video, text) not in partners:
                    exponentials[j] = (nn.functional.cosine_similarity(own[0], other[0], dim=0) / 0.1).exp()
            terms.append(-(exponentials[i] / sum(exponentials.values())).log())
    expected = sum(terms) / 12
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(value.item() - loss(first, second).item()) > 0.1
    for x, double in zip((first, second), doubles, strict=True):
        torch.testing.assert_close(x.grad.double(), double.grad, atol=1e-5, rtol=1e-4)


def test_without_equal_items_the_numbers_change_nothing():
    found = []
    for numbers in (None, (torch.tensor([3, 1, 4, 0, 5, 9]), torch.tensor([9, 2, 6, 5, 3, 0]))):
        first, second = pairs()
        loss = ContrastiveLoss(0.1)
        value = loss(first, second, numbers)
        value.backward()
        found.append((value, first.grad, second.grad, loss.log_scale.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_aligned_pairs_have_no_loss_also_where_texts_are_equal():
    texts = torch.tensor([0, 0, 1, 2])
    embeddings = torch.eye(3)[texts]
    loss = ContrastiveLoss(1 / 100)
    assert loss(embeddings, embeddings).item() == pytest.approx(math.log(2) / 2)
    assert loss(embeddings, embeddings, (torch.arange(4), texts)).item() == pytest.approx(0, abs=1e-6)


def test_without_negatives_the_loss_and_its_gradients_are_zero():
    first, second = pairs()
    value = ContrastiveLoss(0.1)(first, second, (torch.arange(6), torch.zeros(6, dtype=torch.int64)))
    value.backward()
    assert value == 0
    assert not any(x.grad.any() for x in (first, second))


def test_temperature_is_learned_up_to_a_limit():
    first, second = pairs()
    loss = ContrastiveLoss(0.1)
    loss(first, second).backward()
    assert loss.log_scale.grad.abs() > 0
    limit, beyond = ContrastiveLoss(1 / 100), ContrastiveLoss(1 / 500)
    torch.testing.assert_close(beyond(first, second), limit(first, second))


def compare_with_one_process(expected, world):
    numbers, value, gradients = expected
    first, second = pairs()
    part = slice(3 * world.rank, 3 * world.rank + 3)
    loss = ContrastiveLoss(0.1)
    result = loss(first[part], second[part], numbers and tuple(x[part] for x in numbers))
    assert result.item() == pytest.approx(value, rel=1e-5)
    result.backward()
    for tensor, gradient in zip((first, second), gradients[:2], strict=True):
        torch.testing.assert_close(world.mean(tensor.grad), gradient, atol=1e-6, rtol=1e-4)
    assert world.mean(loss.log_scale.grad).item() == pytest.approx(gradients[2].item(), rel=1e-4)


@pytest.mark.parametrize("numbers", [None, NUMBERS], ids=["all differ", "some are equal"])
def test_two_processes_equal_one(numbers):
    first, second = pairs()
    loss = ContrastiveLoss(0.1)
    value = loss(first, second, numbers)
    value.backward()
    gradients = (first.grad, second.grad, loss.log_scale.grad)
    processes.run(compare_with_one_process, (numbers, value.item(), gradients), 2)


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
