"""kNN, retrieval and clustering from stored features, as programs."""

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from evals.clustering import eval as clustering
from evals.knn import eval as knn
from evals.retrieval import eval as retrieval
from tubelet.config import ConfigError, check
from tubelet.features import store
from tubelet.runtime.distributed import World


@pytest.fixture
def features(raw, extract):
    """A store of seven videos with several clips each."""
    return extract(raw, features=["mean", "slots"])


def run(program, name, tmp_path, **options):
    folder = tmp_path / name
    program.main(check({"eval_name": name, "folder": str(folder), **options}, program.Options, "test.yaml"), World())
    return folder, json.loads((folder / "results.json").read_text())


def slow_top1(items, k, temperature, others):
    """Accuracy of a vote of the neighbors of other videos, in loops."""
    mean, hits = others.vectors.mean(0), 0
    for i in range(len(items)):
        cosines = [
            -2.0
            if others is items and items.videos[i] == items.videos[j]
            else float(F.cosine_similarity(items.vectors[i] - mean, others.vectors[j] - mean, dim=0))
            for j in range(len(others))
        ]
        votes = [0.0] * 3
        for j in sorted(range(len(others)), key=lambda j: -cosines[j])[:k]:
            votes[int(others.labels[j])] += math.exp(cosines[j] / temperature) if temperature else 1.0
        hits += votes.index(max(votes)) == int(items.labels[i])
    return 100 * hits / len(items)


@pytest.mark.parametrize("unit", ["video", "clip"])
@pytest.mark.parametrize("kind", ["mean", "slots"])
def test_leave_one_out(features, unit, kind, tmp_path):
    options = {"features": features, "num_classes": 3, "k": [1, 3, 4], "temperature": [0.1, None]}
    folder, results = run(knn, "knn", tmp_path, **options, unit=unit, kind=kind)
    items = store.Store(features).items(kind, unit)
    assert len(results["heads"]) == 6
    for row in results["heads"]:
        expected = slow_top1(items, row["k"], row["temperature"], items)
        assert row["val_top1"] == pytest.approx(expected, abs=1e-3), row
    assert results["top1"] == max(row["val_top1"] for row in results["heads"])
    assert len((folder / "predictions.csv").read_text().splitlines()) == len(items) + 1
    assert (folder / "confusion.png").is_file()


def test_train_and_test(raw, features, extract, collection, tmp_path):
    test = extract(raw, folder=str(tmp_path / "test"), data={"overlap": 0})
    _, results = run(knn, "knn", tmp_path, features=features, test=test, num_classes=3, k=[1, 5])
    train, test = (store.Store(folder).items("mean", "video") for folder in (features, test))
    for row in results["heads"]:
        assert row["val_top1"] == pytest.approx(slow_top1(test, row["k"], 0.07, train), abs=1e-3)
    assert (results["num_train"], results["num_val"]) == (7, 7)


def test_stores_that_do_not_fit(raw, features, extract, tmp_path):
    other = extract(raw, folder=str(tmp_path / "other"), pretrain={"init_seed": 1})
    with pytest.raises(ConfigError, match="features of different encoders"):
        run(knn, "knn", tmp_path, features=features, test=other, num_classes=3)
    with pytest.raises(ConfigError, match=r"has label 2; with num_classes 2"):
        run(knn, "knn", tmp_path, features=features, num_classes=2)
    with pytest.raises(ConfigError, match=r"has mean, no slots; .*features=\[slots\]"):
        run(knn, "knn", tmp_path, features=extract(raw, folder=str(tmp_path / "m"), features=["mean"]), num_classes=3,
            kind="slots")  # fmt: skip
    with pytest.raises(ConfigError, match="has no features; give the folder"):
        run(retrieval, "retrieval", tmp_path, features=str(tmp_path / "nothing"))


@pytest.mark.parametrize("unit", ["video", "clip"])
def test_neighbors_and_their_page(features, unit, tmp_path, collection):
    folder, results = run(retrieval, "retrieval", tmp_path, features=features, unit=unit, k=3, page_queries=2)
    items = store.Store(features).items("mean", unit)
    units = F.normalize(items.vectors - items.vectors.mean(0), dim=1)
    similarity = (units @ units.T).masked_fill(items.videos[:, None] == items.videos, -2)
    rows = pq.read_table(folder / "neighbors.parquet").to_pylist()
    best = similarity.topk(3)
    assert [row["neighbor"] for row in rows] == [items.paths[i] for i in best.indices.flatten()]
    assert [row["query"] for row in rows] == [path for path in items.paths for _ in range(3)]
    assert [row["rank"] for row in rows[:3]] == [1, 2, 3]
    torch.testing.assert_close(torch.tensor([row["similarity"] for row in rows]), best.values.flatten().double(),
                               check_dtype=False, atol=1e-5, rtol=1e-5)  # fmt: skip
    hits = items.labels[best.indices] == items.labels[:, None]
    assert results["recall@1"] == pytest.approx(float(hits[:, 0].double().mean()))
    page = (folder / "retrieval.html").read_text()
    assert page.count("data:image/gif") == 2 * (1 + 3)
    assert "cannot be read" not in page


def test_queries_of_another_store_some_of_them(raw, features, extract, tmp_path):
    queries = extract(raw, folder=str(tmp_path / "queries"), data={"num_segments": 1, "overlap": 0})
    _, results = run(retrieval, "retrieval", tmp_path, features=features, queries=queries, num_queries=3)
    assert (results["queries"], results["gallery"]) == (3, 7)


def test_missing_videos_are_named_on_the_page(raw, extract, collection, tmp_path):
    copies = []
    for number in range(3):
        copies.append(tmp_path / f"copy{number}.mp4")
        copies[-1].write_bytes((collection / f"{number}.mp4").read_bytes())
    folder = extract(raw, data={"datasets": [str(path) for path in copies]})
    copies[1].unlink()
    for program, name, more in ((retrieval, "retrieval", {}), (clustering, "clustering", {"clusters": 2})):
        folder_of_page, results = run(program, name, tmp_path, features=folder, **more)
        page = next(folder_of_page.glob("*.html")).read_text()
        assert "1 of the videos on this page cannot be read" in page
        assert "No such file" in page
        assert page.count("data:image/gif") > 1
        assert "map" not in results  # without labels
        assert "purity" not in results


@pytest.mark.parametrize(
    ("program", "name", "options"),
    [(knn, "knn", {"num_classes": 3}), (retrieval, "retrieval", {}), (clustering, "clustering", {"clusters": 2})],
)
def test_features_that_are_not_finite_are_refused(program, name, options, features, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(features, folder)
    path = max((folder / "tensors").iterdir())
    tensors = load_file(path)
    tensors["mean"][-1] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ConfigError, match="numbers that are not finite; extract the features again"):
        run(program, name, tmp_path, features=str(folder), **options)
    assert not (tmp_path / name).exists()


def test_clusters(features, tmp_path):
    folder, results = run(clustering, "clustering", tmp_path, features=features, clusters=3)
    rows = pq.read_table(folder / "clusters.parquet").to_pylist()
    assert [row["path"] for row in rows] == store.Store(features).items("mean", "video").paths
    assert [sum(row["cluster"] == c for row in rows) for c in range(3)] == results["sizes"]
    assert 0 < results["purity"] <= 1
    assert 0 <= results["nmi"] <= 1
    again, other = run(clustering, "clustering", tmp_path / "again", features=features, clusters=3)
    assert other == results
    with pytest.raises(ConfigError, match="clusters: 8 is more than the 7 vectors"):
        run(clustering, "clustering", tmp_path, features=features, clusters=8)
    assert Path(folder / "clusters.html").read_text().count("<h2>Cluster") == 3


def test_classes_without_votes_are_not_among_the_first_five(features, tmp_path):
    """One neighbor votes for one class, so the others cannot be right."""
    _, results = run(knn, "knn", tmp_path, features=str(features), num_classes=8, k=[1])
    assert results["heads"][0]["val_top5"] == results["heads"][0]["val_top1"]
