"""Classify videos by their nearest neighbors in stored features. `python -m evals.main --fname <yaml>`."""

import functools
import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from tubelet.config import ConfigError, dump
from tubelet.features.options import ItemsConfig
from tubelet.features.store import Items, open_items
from tubelet.probing import neighbors, results
from tubelet.probing.split import check_labels, problems_of_labels
from tubelet.runtime.distributed import World
from tubelet.runtime.files import write_atomic, write_json

logger = logging.getLogger(__name__)


class Options(ItemsConfig):
    eval_name: Literal["knn"]
    test: str | None = None
    """Store of the videos to classify; null: each video of `features` by all others (leave-one-out)."""
    num_classes: int = Field(ge=2)
    """Number of classes."""
    k: list[Annotated[int, Field(ge=1)]] = Field([1, 5, 10, 20, 50], min_length=1)
    """Numbers of neighbors."""
    temperature: list[Annotated[float, Field(gt=0)] | None] = Field([0.07], min_length=1)
    """Weights of the votes, exp(cosine / temperature); null: equal votes."""
    center: bool = True
    """Subtract the mean of `features` first, as the head `knn` of a probe; false: as DINO."""


def main(options: Options, world: World) -> None:
    """Writes `results.json`, `predictions.csv` and `confusion.png` into `options.folder`; rank 0 does all of it."""
    if not world.is_main:
        return
    train, test, description = open_items(options, options.test)
    for items, key in ((train, "features"), (test, "test")):
        if items is not None:
            check_labels(items.labels.tolist(), items.paths, options.num_classes, f"{key}: {getattr(options, key)}")
    val = None if test is None else test.labels.numpy()
    for problem in problems_of_labels(train.labels.numpy(), val, options.num_classes, description.get("classes", ())):
        logger.warning("%s", problem)
    grid = [{"k": k, "temperature": temperature} for k in options.k for temperature in options.temperature]
    queries = train if test is None else test
    validated = _classify(options, train, test, grid, world)
    best = results.best_head(validated.top1, validated.loss, validated.finite)
    assert best is not None  # `open_items` refuses features that are not finite
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", dump(options))
    rows = [{**grid[i], "val_top1": validated.top1[i], "val_top5": validated.top5[i]} for i in range(len(grid))]
    measured: dict[str, Any] = {
        "top1": validated.top1[best],
        "top5": validated.top5[best],
        "best_head": {"index": best, **grid[best]},
        "select": "val" if len(grid) > 1 else None,
        "heads": rows,
        "head": "knn",
        "num_classes": options.num_classes,
        "num_train": len(train) if test is not None else len(train) - 1,
        "num_val": len(queries),
        "encoder": description["encoder"],
    }
    results.write_predictions(folder / "predictions.csv", validated, best, queries.paths)
    results.draw_confusion(folder / "confusion.png", validated, best, options.num_classes)
    write_json(folder / "results.json", measured)


def _classify(
    options: Options, train: Items, test: Items | None, grid: list[dict[str, Any]], world: World
) -> results.Validated:
    """Validate each (k, temperature) of `grid` on all queries."""
    device = world.device
    vectors, labels = train.vectors.to(device), train.labels.to(device)
    mean = vectors.mean(0) if options.center else None
    gallery = neighbors.directions(vectors, mean)
    if test is None:
        groups = train.videos.to(device)
        search = functools.partial(neighbors.nearest, gallery, gallery, groups=(groups, groups))
        if len(groups.unique()) < 2:
            raise ConfigError(f"features: {options.features} has a single video, which has no neighbors")
    else:
        search = functools.partial(neighbors.nearest, neighbors.directions(test.vectors.to(device), mean), gallery)
    similarity, indices = search(max(options.k))
    queries = train if test is None else test

    def batches():
        for first in range(0, len(queries), 1024):
            rows = slice(first, first + 1024)  # an index on the host would be copied to the device
            voted = [
                neighbors.votes(
                    similarity[rows, : each["k"]],
                    labels[indices[rows, : each["k"]]],
                    options.num_classes,
                    each["temperature"],
                )
                for each in grid
            ]
            yield torch.stack(voted), queries.labels[rows], torch.arange(len(queries))[rows]

    return results.validate(batches(), options.num_classes, World(), options.features)
