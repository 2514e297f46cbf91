import math

import pytest
import torch

from tubelet.training.feature_statistics import clip_statistics, feature_std, knn_accuracy, rank_me, summarize


def test_rank_of_known_spectra():
    orthonormal = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert rank_me(orthonormal, center=False) == pytest.approx(8, abs=1e-4)
    assert rank_me(torch.ones(16, 4), center=False) == pytest.approx(1, abs=1e-4)
    p = torch.tensor([0.5, 0.3, 0.2])
    expected = float(torch.exp(-(p * p.log()).sum()))
    assert rank_me(orthonormal[:, :3] * p, center=False) == pytest.approx(expected, abs=1e-4)


def test_uncentered_rank_shows_a_collapse_that_the_centered_one_hides():
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    collapsed = 100 + 0.01 * noise
    assert rank_me(collapsed, center=True) > 10
    assert rank_me(collapsed, center=False) < 1.1


def test_std_within_and_across_clips():
    same_clip = torch.randn(1, 6, 4).expand(8, 6, 4)
    within, across = feature_std(*clip_statistics(same_clip))
    assert within > 0.1
    assert across == pytest.approx(0, abs=1e-6)
    same_token = torch.randn(8, 1, 4).expand(8, 6, 4)
    within, across = feature_std(*clip_statistics(same_token))
    assert within == pytest.approx(0, abs=1e-6)
    assert across > 0.1


def reference(tokens, labels):
    """The definitions, with all tokens [n, N, D] at hand in fp64."""
    tokens = tokens.double()
    pooled = tokens.mean(1)
    rms = tokens.square().mean().sqrt()
    figures = {
        "spread_within": float(tokens.var(dim=1, unbiased=False).mean().sqrt() / rms),
        "spread_across": float(pooled.var(dim=0, unbiased=False).mean().sqrt() / rms),
    }
    for name, features in (("rank_centered", pooled - pooled.mean(0)), ("rank_uncentered", pooled)):
        p = torch.linalg.svdvals(features)
        p = p / p.sum()
        figures[name] = float(torch.exp(-torch.special.xlogy(p, p).sum()))
    unit = torch.nn.functional.normalize(pooled - pooled.mean(0), dim=1)
    correct = 0
    for i in range(len(labels)):
        similarity = unit @ unit[i]
        similarity[i] = -torch.inf
        correct += int(labels[similarity.topk(5).indices].mode().values == labels[i])
    return figures | {"knn": 100 * correct / len(labels)}


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_statistics_of_batches_equal_the_definition_on_all_tokens(offset):
    """Also close to a collapse, where the variance is a small difference of large numbers."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 3
    means = torch.randn(40, 1, 24, generator=generator) + 3 * torch.nn.functional.one_hot(labels, 24)[:, None]
    tokens = torch.randn(40, 50, 24, generator=generator) + means + offset
    parts = [clip_statistics(batch) for batch in tokens.split(7)]
    mean_tokens, variances = (torch.cat(part) for part in zip(*parts, strict=True))
    assert summarize(mean_tokens, variances, labels) == pytest.approx(reference(tokens, labels), abs=1e-6, rel=1e-6)


def test_features_that_are_not_finite_give_nan():
    tokens = torch.randn(6, 5, 4)
    tokens[2, 1, 3] = torch.inf
    figures = summarize(*clip_statistics(tokens), torch.tensor([0, 1, 0, 1, -1, -1]))
    assert figures.keys() == {"rank_centered", "rank_uncentered", "spread_within", "spread_across", "knn"}
    assert all(math.isnan(figure) for figure in figures.values())


def test_knn_against_sklearn():
    neighbors = pytest.importorskip("sklearn.neighbors")
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (60,), generator=generator)
    features = torch.randn(60, 5, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 5)
    unit = torch.nn.functional.normalize(features - features.mean(0))
    correct = 0
    for i in range(60):
        others = [j for j in range(60) if j != i]
        model = neighbors.KNeighborsClassifier(5, metric="cosine").fit(unit[others], labels[others])
        correct += int(model.predict(unit[i : i + 1])[0] == labels[i])
    assert knn_accuracy(features, labels, k=5) == pytest.approx(100 * correct / 60, abs=1e-4)
