"""k-means, purity and NMI against scikit-learn."""

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix

from tubelet.features.clustering import agreement, kmeans


@pytest.fixture
def blobs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    centers = 3 * torch.randn(5, 8, generator=generator)
    return centers[labels] + torch.randn(200, 8, generator=generator), labels


@pytest.mark.parametrize("k", [1, 5, 12, 200])
def test_as_good_as_sklearn(blobs, k):
    vectors, _ = blobs
    found = kmeans(vectors, k, seed=0, restarts=10)
    reference = KMeans(k, n_init=10, random_state=0).fit(vectors)
    assert found.inertia == pytest.approx(reference.inertia_, rel=0.05, abs=1e-2)
    assert len(found.assignment.unique()) == k
    distances = torch.cdist(vectors, found.centers)
    assert torch.equal(distances.argmin(1), found.assignment)
    torch.testing.assert_close(distances.min(1).values, found.distances)
    means = torch.stack([vectors[found.assignment == cluster].mean(0) for cluster in range(k)])
    torch.testing.assert_close(found.centers, means, atol=1e-4, rtol=1e-4)


def test_a_function_of_the_seed(blobs):
    vectors, _ = blobs
    torch.manual_seed(1)
    first = kmeans(vectors, 7, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first.assignment, kmeans(vectors, 7, seed=3).assignment)
    assert not torch.equal(first.assignment, kmeans(vectors, 7, seed=4).assignment)


def test_equal_vectors_and_too_many_clusters():
    found = kmeans(torch.ones(6, 3), 3, seed=0)
    assert found.inertia == 0
    with pytest.raises(ValueError, match="7 clusters of 6 vectors"):
        kmeans(torch.ones(6, 3), 7, seed=0)


def test_agreement_with_labels(blobs):
    vectors, labels = blobs
    for k in (1, 3, 5, 20):
        assignment = kmeans(vectors, k, seed=0).assignment
        found = agreement(assignment, labels * 7)  # classes need not be consecutive
        assert found["purity"] == pytest.approx(contingency_matrix(labels, assignment).max(0).sum() / len(labels))
        assert found["nmi"] == pytest.approx(normalized_mutual_info_score(labels, assignment), abs=1e-9)
    assert agreement(torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.int64)) == {"purity": 1, "nmi": 1}
