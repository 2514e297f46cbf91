import pytest
import torch

from tubelet.training.feature_statistics import knn_accuracy, rank_me, spread


def test_rank_of_known_spectra():
    orthonormal = torch.linalg.qr(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert rank_me(orthonormal, center=False) == pytest.approx(8, abs=1e-4)
    assert rank_me(torch.ones(16, 4), center=False) == pytest.approx(1, abs=1e-4)
    p = torch.tensor([0.5, 0.3, 0.2])
    expected = float(torch.exp(-(p * p.log()).sum()))
    assert rank_me(orthonormal[:, :3] * p, center=False) == pytest.approx(expected, abs=1e-4)


def test_uncentred_rank_shows_a_collapse_that_the_centred_one_hides():
    noise = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    collapsed = 100 + 0.01 * noise
    assert rank_me(collapsed, center=True) > 10
    assert rank_me(collapsed, center=False) < 1.1


def test_spread_within_and_across():
    same_clip = torch.randn(1, 6, 4).expand(8, 6, 4)
    within, across = spread(same_clip)
    assert within > 0.1
    assert across == pytest.approx(0, abs=1e-6)
    same_token = torch.randn(8, 1, 4).expand(8, 6, 4)
    within, across = spread(same_token)
    assert within == pytest.approx(0, abs=1e-6)
    assert across > 0.1


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
