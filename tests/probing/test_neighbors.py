"""Neighbors and votes against scikit-learn and slow loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier

from tubelet.probing import neighbors
from tubelet.probing.heads.knn import NearestNeighborsHead

CLASSES = 4


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (90,), generator=generator)
    centers = torch.randn(CLASSES, 12, generator=generator)
    vectors = centers[labels] + 1.5 * torch.randn(90, 12, generator=generator)
    return (vectors[:60], labels[:60]), (vectors[60:], labels[60:])


def fractions(train, test, k, temperature):
    gallery, queries = neighbors.directions(train[0]), neighbors.directions(test[0])
    similarity, indices = neighbors.nearest(queries, gallery, k)
    return neighbors.votes(similarity, train[1][indices], CLASSES, temperature)


@pytest.mark.parametrize("k", [1, 3, 10, 60])
def test_equal_votes_are_those_of_sklearn(data, k):
    train, test = data
    reference = KNeighborsClassifier(k, metric="cosine").fit(train[0], train[1])
    expected = torch.from_numpy(reference.predict_proba(test[0])).float()
    torch.testing.assert_close(fractions(train, test, k, None), expected)


@pytest.mark.parametrize("k", [1, 7, 60])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_weighted_votes_are_those_of_a_slow_loop(data, k, temperature):
    train, test = data
    found = fractions(train, test, k, temperature)
    for query, row in zip(test[0], found, strict=True):
        cosines = [float(F.cosine_similarity(query, x, dim=0)) for x in train[0]]
        votes = [0.0] * CLASSES
        for i in sorted(range(60), key=lambda i: -cosines[i])[:k]:
            votes[int(train[1][i])] += math.exp(cosines[i] / temperature)
        torch.testing.assert_close(row, torch.tensor(votes) / sum(votes), atol=1e-4, rtol=1e-3)


def test_the_head_of_a_probe_votes_in_the_same_way(data):
    train, test = data
    head = NearestNeighborsHead(12, CLASSES, k=(5,), temperature=0.1)
    head.fit(train[0][:, None], train[1])
    mean = train[0].mean(0)
    centered = [(vectors - mean, labels) for vectors, labels in data]
    torch.testing.assert_close(head(test[0][:, None]).exp(), fractions(*centered, 5, 0.1))


def test_chunks_and_groups(data, monkeypatch):
    (vectors, _), _ = data
    units = neighbors.directions(vectors)
    groups = torch.arange(60) // 3
    similarity = units @ units.T
    expected = similarity.masked_fill(groups[:, None] == groups, -2).topk(4)
    for entries in (2**26, 130):
        monkeypatch.setattr(neighbors, "MAX_ENTRIES", entries)
        found = neighbors.nearest(units, units, 4, (groups, groups))
        assert torch.equal(found[1], expected.indices)
        assert (groups[found[1]] != groups[:, None]).all()
    assert neighbors.nearest(units, units, 1000, (groups, groups))[1].shape == (60, 57)
    with pytest.raises(ValueError, match="no vectors of other groups"):
        neighbors.nearest(units, units, 3, (groups * 0, groups * 0))


def test_recall_and_mean_average_precision(data, monkeypatch):
    (vectors, labels), _ = data
    units, groups = neighbors.directions(vectors), torch.arange(60)
    precision, hits = [], {1: 0, 5: 0}
    for i in range(60):
        others = np.delete(np.arange(60), i)
        cosines, relevant = (units[others] @ units[i]).numpy(), (labels[others] == labels[i]).numpy()
        precision.append(average_precision_score(relevant, cosines))
        ranked = relevant[np.argsort(-cosines)]
        for k in hits:
            hits[k] += bool(ranked[:k].any())
    for entries in (2**26, 130):
        monkeypatch.setattr(neighbors, "MAX_ENTRIES", entries)
        found = neighbors.retrieval_scores(units, units, labels, labels, [1, 5], (groups, groups))
        assert found == pytest.approx(
            {"recall@1": hits[1] / 60, "recall@5": hits[5] / 60, "map": np.mean(precision)}, abs=1e-5
        )
