"""Floors of labelled video sets: how far one gets without a network. `python -m evals.main --fname <yaml>`."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from tubelet.config import Config, dump
from tubelet.data import Decoder
from tubelet.data.sources import read_list
from tubelet.probing import baselines as floors
from tubelet.probing.split import check_labels, few_per_class
from tubelet.runtime.distributed import World
from tubelet.runtime.parallelize import DistributedConfig
from tubelet.runtime.progress import progress
from tubelet.runtime.run_folder import write_atomic
from tubelet.runtime.watchdog import Watchdog


class Task(Config):
    """A labelled set: lists of `path label` lines."""

    train: str
    test: str
    num_classes: int = Field(ge=2)
    labels_per_class: int | None = Field(None, ge=1)
    """Train on that many videos of each class, the same ones as a probe of the same seed."""


class Options(Config):
    eval_name: Literal["floors"]
    folder: str
    floors: list[Literal["frame", "difference", "metadata"]] = Field(["frame", "difference"], min_length=1)
    num_frames: int = Field(16, ge=2)
    """Frames, evenly over the video, between which differences are taken."""
    average: bool = True
    """The differences' mean over time; false: each for itself, which tells more."""
    decoder: Decoder = "pyav"
    distributed: DistributedConfig = DistributedConfig()
    tasks: dict[str, Task] = Field(min_length=1)
    seeds: list[int] = Field([0], min_length=1)


def main(options: Options, world: World) -> None:
    """Writes `results.json`: {"floors": {floor: {task: {seed: {"top1", "num_val"}}}}}.

    The processes share the reading of the videos; the main one does the rest.
    """
    lists = {path: read_list(Path(path)) for task in options.tasks.values() for path in (task.train, task.test)}
    paths = dict.fromkeys(path for source in lists.values() for path in source.paths)
    described = _described(list(paths), options, world)
    if not world.is_main:
        return
    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", dump(options))
    results: dict = {floor: {name: {} for name in options.tasks} for floor in options.floors}
    jobs = [(floor, name, seed) for floor in options.floors for name in options.tasks for seed in options.seeds]
    for floor, name, seed in progress(jobs, desc="floors: fitting", unit="fit"):
        task = options.tasks[name]
        train, val = lists[task.train], lists[task.test]
        for source, key in ((train, "train"), (val, "test")):
            check_labels(source.labels, source.paths, task.num_classes, f"tasks.{name}.{key}")
        chosen = few_per_class(train.labels, task.labels_per_class, seed)
        # Without a subset to draw, nothing depends on the seed.
        found = next(iter(results[floor][name].values()), None) if task.labels_per_class is None else None
        results[floor][name][str(seed)] = found or {
            "top1": floors.accuracy(
                floors.stacked([described[path] for path in train.paths], floor)[chosen],
                torch.tensor(train.labels)[chosen],
                floors.stacked([described[path] for path in val.paths], floor),
                torch.tensor(val.labels),
                task.num_classes,
            ),
            "num_val": len(val.paths),
        }
    write_atomic(folder / "results.json", json.dumps({"floors": results}, indent=1))


def _described(paths: list[str], options: Options, world: World) -> dict[str, dict[str, np.ndarray]]:
    """What the floors see of each video, read by all processes in step."""
    described = {}
    with Watchdog(world, options.distributed.timeout) as watchdog:
        bar = progress(desc="floors: reading videos", total=len(paths), unit="video", off=not world.is_main)
        for first in range(0, len(paths), world.world_size):
            watchdog.note(f"reading video {first + world.rank + 1} of {len(paths)}")
            own = paths[first + world.rank : first + world.rank + 1]
            seen = [(path, floors.describe(path, options.num_frames, options.average, options.decoder)) for path in own]
            described |= dict(pair for pairs in world.all_gather_object(seen) for pair in pairs)
            bar.update(min(world.world_size, len(paths) - first))
        bar.close()
    return described
