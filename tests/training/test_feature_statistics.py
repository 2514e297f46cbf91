import math

import pytest
import torch

from tubelet.training.feature_statistics import TokenMoments, knn_accuracy, rank_me, residual_variance, summarize


def squared_singular_values(features):
    return torch.linalg.svdvals(features.double()).square()


def test_rank_and_residual_variance_of_known_spectra():
    eight = torch.ones(8).double()
    assert float(rank_me(eight)) == pytest.approx(8)
    assert float(residual_variance(eight)) == pytest.approx(6 / 8)
    two = torch.tensor([0, 4.0, 4.0]).double()
    assert float(rank_me(two)) == pytest.approx(2)
    assert float(residual_variance(two)) == 0
    p = torch.tensor([0.2, 0.3, 0.5]).double()
    assert float(rank_me(p.square())) == pytest.approx(math.exp(-sum(x * math.log(x) for x in (0.5, 0.3, 0.2))))
    assert float(residual_variance(p)) == pytest.approx(0.2)


def test_uncentered_rank_shows_a_collapse_that_the_centered_one_hides():
    noise = torch.randn(64, 1, 16, generator=torch.Generator().manual_seed(0))
    figures = summarize(TokenMoments.of(100 + 0.01 * noise), torch.full((64,), -1))
    assert figures["rank_centered"] > 10
    assert figures["rank_uncentered"] < 1.1


def test_residual_variance_shows_a_collapse_that_the_rank_hides():
    """Two directions take over, but the others keep a fifteenth of their standard deviation."""
    features = torch.randn(256, 1, 64, generator=torch.Generator().manual_seed(0))
    features[..., :2] *= 15
    figures = summarize(TokenMoments.of(features), torch.full((256,), -1))
    assert figures["rank_centered"] > 30
    assert figures["residual_variance"] < 0.15


def reference(tokens, labels, slots):
    """The definitions, with all tokens [n, N, D] at hand in fp64."""
    tokens = tokens.double()
    pooled = tokens.mean(1)
    rms = tokens.square().mean().sqrt()
    own = tokens - tokens.mean(0)  # without what all clips have in common at a position
    of_slots = own.unflatten(1, (slots, -1)).mean(2)
    figures = {
        "spread_within": float(tokens.var(dim=1, unbiased=False).mean().sqrt() / rms),
        "spread_across": float(pooled.var(dim=0, unbiased=False).mean().sqrt() / rms),
        "spread_tokens": float(own.var(dim=1, unbiased=False).mean().sqrt() / rms),
        "spread_time": float(of_slots.var(dim=1, unbiased=False).mean().sqrt() / rms),
    }
    for name, features in (("rank_centered", pooled - pooled.mean(0)), ("rank_uncentered", pooled)):
        p = torch.linalg.svdvals(features)
        p = p / p.sum()
        figures[name] = float(torch.exp(-torch.special.xlogy(p, p).sum()))
    variances = torch.linalg.eigvalsh(torch.cov(pooled.T))
    figures["residual_variance"] = float(1 - variances[-2:].sum() / variances.sum())
    unit = torch.nn.functional.normalize(pooled - pooled.mean(0), dim=1)
    correct = 0
    for i in range(len(labels)):
        similarity = unit @ unit[i]
        similarity[i] = -torch.inf
        correct += int(labels[similarity.topk(5).indices].mode().values == labels[i])
    return figures | {"knn": 100 * correct / len(labels)}


@pytest.mark.parametrize("clips", [20, 40])  # fewer and more than dimensions
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_statistics_of_batches_equal_the_definition_on_all_tokens(offset, clips):
    """Also close to a collapse, where the variance is a small difference of large numbers."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(clips) % 3
    means = torch.randn(clips, 1, 24, generator=generator) + 3 * torch.nn.functional.one_hot(labels, 24)[:, None]
    positions = torch.randn(48, 24, generator=generator)
    tokens = torch.randn(clips, 48, 24, generator=generator) + means + positions + offset
    moments = TokenMoments.concatenate([TokenMoments.of(batch, slots=4) for batch in tokens.split(7)])
    assert summarize(moments, labels) == pytest.approx(reference(tokens, labels, 4), abs=1e-6, rel=2e-6)


def test_fp32_suffices_where_positions_outweigh_the_content():
    generator = torch.Generator().manual_seed(0)
    positions = 30 * torch.randn(64, 96, generator=generator)
    tokens = positions + 0.1 * torch.randn(256, 64, 96, generator=generator)
    labels = torch.arange(256) % 4
    expected = reference(tokens, labels, 4)
    figures = summarize(TokenMoments.of(tokens, slots=4), labels)
    for name in ("spread_tokens", "spread_time", "spread_across", "residual_variance"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-2), name


def test_clips_beyond_the_count_are_not_in_the_sum_over_clips():
    tokens = torch.randn(5, 6, 4)
    assert torch.equal(TokenMoments.of(tokens, count=3).positions, tokens[:3].sum(0))
    assert torch.equal(TokenMoments.of(tokens, count=0).positions, torch.zeros(6, 4))


@pytest.mark.parametrize("slots", [1, 5])
def test_features_that_are_not_finite_give_nan(slots):
    tokens = torch.randn(6, 5, 4)
    labels = torch.tensor([0, 1, 0, 1, -1, -1])
    names = summarize(TokenMoments.of(tokens, slots), labels).keys()
    assert ("spread_time" in names) == (slots > 1)
    tokens[2, 1, 3] = torch.inf
    figures = summarize(TokenMoments.of(tokens, slots), labels)
    assert figures.keys() == names
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
    assert float(knn_accuracy(features, labels, k=5)) == pytest.approx(100 * correct / 60, abs=1e-4)
