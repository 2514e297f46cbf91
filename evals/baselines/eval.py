"""Non-learned baselines of labelled video sets. `python -m evals.main --fname <yaml>`."""

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from tubelet.config import Config, dump, naming
from tubelet.data import Decoder
from tubelet.data.sources import Source, number_classes, read_list
from tubelet.probing import baselines
from tubelet.probing.label_subset import LabelSubset
from tubelet.probing.split import check_labels, labelled_subset, problems_of_labels
from tubelet.runtime.distributed import World
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.parallelize import DistributedConfig
from tubelet.runtime.progress import progress
from tubelet.runtime.watchdog import Watchdog

logger = logging.getLogger(__name__)


class Task(LabelSubset):
    """A labelled set: lists of `path label` lines. Subsets are those of a probe of the same seed."""

    train: str
    """List of the training videos."""
    test: str
    """List of the test videos."""
    num_classes: int = Field(ge=2)
    """Number of classes."""


class Options(Config):
    eval_name: Literal["baselines"]
    folder: str
    """Folder of the results."""
    kinds: list[Literal["frame", "difference", "metadata"]] = Field(["frame", "difference"], min_length=1)
    """Inputs of the logistic regression; see `tubelet.probing.baselines.describe`."""
    num_frames: int = Field(16, ge=2)
    """Frames, evenly spaced over the video, between which differences are taken."""
    average: bool = True
    """Average the differences over time; false: use each, which contains more."""
    decoder: Decoder = Decoder()
    distributed: DistributedConfig = DistributedConfig()
    tasks: dict[str, Task] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    """Seeds of the few-shot subsets; each is run."""


def main(options: Options, world: World) -> None:
    """Writes `results.json`: {"baselines": {kind: {task: {seed: {"top1", "num_val"}}}}}.

    The processes share the reading of the videos; rank 0 does the rest.
    """
    lists: dict[str, Source] = {}
    for name, task in options.tasks.items():
        for key, path in (("train", task.train), ("test", task.test)):
            with naming(f"tasks.{name}.{key}", instead_of="data.datasets"):
                lists[path] = read_list(Path(path))
    paths = list(dict.fromkeys(path for source in lists.values() for path in source.paths))
    described = _describe(paths, options, world)
    if not world.is_main:
        return
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", dump(options))
    results: dict[str, Any] = {kind: {name: {} for name in options.tasks} for kind in options.kinds}
    jobs = [(kind, name, seed) for kind in options.kinds for name in options.tasks for seed in options.seeds]
    for kind, name, seed in progress(jobs, desc="baselines: fitting", unit="fit"):
        task, of_task = options.tasks[name], results[kind][name]
        if of_task and task.is_all:  # nothing depends on the seed
            of_task[str(seed)] = next(iter(of_task.values()))
        else:
            of_task[str(seed)] = _measure(kind, name, task, seed, lists, described)
    write_json(folder / "results.json", {"baselines": results})


def _measure(
    kind: str, name: str, task: Task, seed: int, lists: dict[str, Source], described: dict[str, dict[str, np.ndarray]]
) -> dict[str, float]:
    train, val = lists[task.train], lists[task.test]
    with naming(f"tasks.{name}", instead_of="data.datasets"):
        classes, (train_labels, val_labels) = number_classes([task.train, task.test], [train, val])
    for labels, source, key in ((train_labels, train, "train"), (val_labels, val, "test")):
        check_labels(labels, source.paths, task.num_classes, f"tasks.{name}.{key}")
    for problem in problems_of_labels(train_labels, val_labels, task.num_classes, classes):
        logger.warning("tasks.%s: %s", name, problem)
    chosen = labelled_subset(train_labels, task, seed)
    top1 = baselines.accuracy(
        baselines.stack([described[path] for path in train.paths], kind)[chosen],
        torch.tensor(np.asarray(train_labels))[chosen],
        baselines.stack([described[path] for path in val.paths], kind),
        torch.tensor(np.asarray(val_labels)),
        task.num_classes,
    )
    return {"top1": top1, "num_val": len(val.paths)}


def _describe(paths: list[str], options: Options, world: World) -> dict[str, dict[str, np.ndarray]]:
    """The inputs of the baselines for each video, read by all processes in step."""
    described: dict[str, dict[str, np.ndarray]] = {}
    with Watchdog(world, options.distributed.timeout) as watchdog:
        bar = progress(desc="baselines: reading videos", total=len(paths), unit="video", off=not world.is_main)
        for first in range(0, len(paths), world.world_size):
            watchdog.note(f"reading video {first + world.rank + 1} of {len(paths)}")
            part = [
                (path, baselines.describe(path, options.num_frames, options.average, options.decoder))
                for path in paths[first + world.rank : first + world.rank + 1]
            ]
            described |= dict(pair for pairs in world.all_gather_object(part) for pair in pairs)
            bar.update(min(world.world_size, len(paths) - first))
        bar.close()
    return described
