"""A probe from its options to its results: select videos, extract features, train heads, select one, validate."""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tubelet.config import ConfigError
from tubelet.probing import head_file, results, split
from tubelet.probing import heads as ensemble
from tubelet.probing.clips import LabelledClips, train_and_val
from tubelet.probing.encoder import FrozenEncoder, check_clip_size, with_normalization
from tubelet.probing.features import Features
from tubelet.probing.fit import Fitted, Fitter, HeadsDiverged, other_inputs
from tubelet.probing.heads import Head, build_head
from tubelet.probing.options import ProbeOptions
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.runtime.files import read_json, write_json
from tubelet.runtime.progress import progress
from tubelet.runtime.run_folder import RunFolder, check_same_configuration
from tubelet.runtime.watchdog import Watchdog
from tubelet.training.loggers import make_loggers

logger = logging.getLogger(__name__)

VERSION = 2
"""Version of the values that `inputs` is a hash of; results of another version are not reused."""
FINAL_STAGE = "all"
"""Name of the fit on all training videos."""
MAX_STATISTICS = 2048
"""Training videos from which the mean and standard deviation for a linear head are computed."""

Grid = list[tuple[float, float]]
"""(lr, weight_decay) of each head."""
Rows = list[dict[str, Any]]
"""What results.json says of each head."""


def run(options: ProbeOptions, world: World) -> dict[str, Any]:
    """Run each task and seed of `options` in its folder; what is finished is not run again.

    All processes share the work and get the results, which are those of one process with the same global batch; rank 0
    writes them.

    Returns:
        The content of `results.json` in `options.folder`.
    """
    options = world.broadcast_from_rank0(lambda: with_normalization(options))
    tasks = {"": options}
    if options.tasks:
        tasks = {name: with_normalization(options.task(name)) for name in options.tasks}
    data_by_task = {name: _labelled(task, world) for name, task in tasks.items()}
    with Watchdog(world, options.distributed.timeout) as watchdog:
        encoder = FrozenEncoder(options, world.device)
        if len(set(world.all_gather_object(encoder.fingerprint))) > 1:
            raise ConfigError(
                "pretrain: the processes have read different weights; name one file in pretrain.checkpoint"
            )
        for name, task in tasks.items():
            check_clip_size(encoder.module, task.data.frames_per_clip, task.optimization.resolution, name)
        measured = {name: _all_seeds(task, encoder, *data_by_task[name], watchdog) for name, task in tasks.items()}
    if not options.tasks:
        return measured[""]
    if world.is_main:
        write_json(Path(options.folder) / "results.json", {"tasks": measured})
    return {"tasks": measured}


def _labelled(options: ProbeOptions, world: World) -> tuple[LabelledClips, LabelledClips]:
    """The training and validation videos. A problem in any list is an error before anything is computed."""
    resolution, seed = options.optimization.resolution, options.seeds[0]
    train, val = train_and_val(options.data, options.data_aug, resolution=resolution, seed=seed, world=world)
    for seed in options.seeds:
        split.few_per_class(train.labels, options.data.labels_per_class, seed)
    return train, val


def _all_seeds(
    options: ProbeOptions, encoder: FrozenEncoder, train: LabelledClips, val: LabelledClips, watchdog: Watchdog
) -> dict[str, Any]:
    if isinstance(options.meta.seed, int):
        return Probe(options, encoder, train, val, watchdog).run()
    measured = [Probe(options.with_seed(seed), encoder, train, val, watchdog).run() for seed in options.seeds]
    summary = results.over_seeds(options.seeds, measured)
    if watchdog.world.is_main:
        write_json(Path(options.folder) / "results.json", summary)
    return summary


class Probe:
    """One probe with one seed, in one folder."""

    def __init__(
        self,
        options: ProbeOptions,
        encoder: FrozenEncoder,
        train: LabelledClips,
        val: LabelledClips,
        watchdog: Watchdog,
    ):
        self.options, self.encoder, self.world = options, encoder, watchdog.world
        (self.seed,) = options.seeds
        self.folder = Path(options.folder)
        self.global_batch = options.optimization.batch_size * self.world.world_size
        self._uses_mean_token = ensemble.uses_mean_token(options.head)
        self.train, self.val = (
            Features(clips, encoder, watchdog, segments=options.data.num_segments, only_mean=self._uses_mean_token)
            for clips in (train, val)
        )
        self.chosen = torch.tensor(split.few_per_class(train.labels, options.data.labels_per_class, self.seed))
        lists = (train.paths, train.labels, val.paths, val.labels)
        normalization = (encoder.mean, encoder.std)
        self.inputs = split.fingerprint(VERSION, self.global_batch, encoder.fingerprint, normalization, *lists)

    def run(self) -> dict[str, Any]:
        """The content of `results.json`: measured now, or read where the folder's probe is finished.

        Raises:
            ConfigError: The folder holds a probe of other options, weights or labels.
            HeadsDiverged: No head can be used.
        """
        file = self.folder / "results.json"
        finished = self.world.broadcast_from_rank0(lambda: read_json(file))
        self._check_same_options()
        if finished:
            checkpoint.check_same_batch_size(finished["global_batch"], self.global_batch, "optimization.batch_size")
            if finished["inputs"] != self.inputs:
                raise other_inputs(self.folder)
            return finished
        started = time.perf_counter()
        self._extract_features()
        extracted = time.perf_counter()
        measured = self._measure()
        measured["seconds"] = {"features": extracted - started, "heads": time.perf_counter() - extracted}
        if self.world.is_main:
            write_json(file, measured)
            shutil.rmtree(self.folder / "checkpoints")  # the trained head is kept; a study makes hundreds of these
        return measured

    def _check_same_options(self) -> None:
        self.world.broadcast_from_rank0(lambda: check_same_configuration(self.folder, self.options))

    def _extract_features(self) -> None:
        """Extract the features once, where `data.cache_features` is set."""
        data, batch_size = self.options.data, self.options.optimization.batch_size
        if data.cache_features:
            folder = self.folder / "features" if data.cache_features is True else Path(data.cache_features)
            self.train.extract(self.chosen, folder, batch_size, data.feature_memory)
            self.val.extract(torch.arange(len(self.val.clips)), folder, batch_size, data.feature_memory)

    def _measure(self) -> dict[str, Any]:
        """Train the heads, select one, and write its files."""
        grid = self.options.optimization.grid()
        rows: Rows = [{"lr": lr, "weight_decay": weight_decay} for lr, weight_decay in grid]
        fitter = self._fitter()
        with contextlib.closing(_Log(self, fitter)) as log:
            finalists = self._finalists(fitter, grid, rows)
            samples = self._readable()
            last_epoch = fitter.epochs(len(samples))
            fitted = fitter.fit(
                FINAL_STAGE,
                [grid[g] for g in finalists],
                samples,
                lambda epoch, losses: log.write(epoch, last_epoch, finalists, losses),
            )
        validated = self._validate(fitter, fitted, self.val, torch.arange(len(self.val.clips)))
        for column, g in enumerate(finalists):
            rows[g] |= {
                "train_loss": fitted.train_loss[column],
                "train_top1": fitted.train_top1[column],
                "val_top1": validated.top1[column],
                "val_top5": validated.top5[column],
            }
            if not math.isfinite(fitted.train_loss[column] + validated.loss[column]):
                rows[g] |= dict.fromkeys(("train_loss", "train_top1", "val_top1", "val_top5"))
        best = results.best_head(validated.top1, validated.loss, fitted.train_loss)
        if best is None:
            raise HeadsDiverged(self.folder, "in validation")
        if self.world.is_main:
            self._write(fitted.heads.members[best], validated, best)
        index = finalists[best]
        return {
            "top1": validated.top1[best],
            "top5": validated.top5[best],
            "train_loss": fitted.train_loss[best],
            "train_top1": fitted.train_top1[best],
            "best_head": {"index": index, "lr": grid[index][0], "weight_decay": grid[index][1]},
            "select": self.options.optimization.select if len(grid) > 1 else None,
            "heads": rows,
            "head": self.options.head.name,
            "seed": self.seed,
            "num_classes": self.options.data.num_classes,
            "num_train": len(self._readable()),
            "num_val": len(validated.labels),
            "excluded": self._excluded(),
            "encoder": self.encoder.fingerprint,
            "global_batch": self.global_batch,
            "inputs": self.inputs,
        }

    def _fitter(self) -> Fitter:
        return Fitter(
            options=self.options.optimization,
            features=self.train,
            make_head=self._head_maker(),
            seed=self.seed,
            folder=self.folder,
            global_batch=self.global_batch,
            inputs=self.inputs,
            save_every_minutes=self.options.meta.save_every_minutes,
        )

    def _head_maker(self) -> Callable[[], Head]:
        """A function that makes a new head."""
        statistics = None
        if self._uses_mean_token:
            sample = self.chosen[:: -(-len(self.chosen) // MAX_STATISTICS)]
            across = self.options.optimization.attend_across_segments
            statistics = self.train.mean_and_std(sample.split(self.global_batch), across)

        def make() -> Head:
            head = build_head(self.options.head, self.encoder.module, self.options.data.num_classes)
            if statistics is not None:
                head.set_statistics(*statistics)
            return head

        return make

    def _readable(self) -> Tensor:
        """The samples to train on, without those known to be unreadable."""
        return self.chosen[self.train.readable(self.chosen)]

    def _finalists(self, fitter: Fitter, grid: Grid, rows: Rows) -> list[int]:
        """The heads that are trained on all training videos: the best one of held-out videos, or all of them."""
        if self.options.optimization.select != "holdout" or len(grid) == 1:
            return list(range(len(grid)))
        top1, loss, train_loss = self._holdout(fitter, grid)
        for row, *figures in zip(rows, top1, loss, train_loss, strict=True):
            finite = all(map(math.isfinite, figures))
            names = ("holdout_top1", "holdout_loss", "holdout_train_loss")
            row |= dict(zip(names, figures if finite else [None] * 3, strict=True))
        best = results.best_head(top1, loss, train_loss)
        if best is None:
            raise HeadsDiverged(self.folder, "on held-out videos")
        return [best]

    def _holdout(self, fitter: Fitter, grid: Grid) -> tuple[list[float], list[float], list[float]]:
        """Accuracy (percent) and loss of each head on held-out training videos, and training loss; means over folds."""
        o = self.options.optimization
        readable = self._readable()
        labels = [self.train.clips.labels[i] for i in readable.tolist()]
        part = torch.tensor(split.stratified_parts(labels, round(1 / o.holdout_fraction), self.seed))
        folds = []
        for fold in range(o.holdout_folds):
            if not 0 < (part == fold).sum() < len(part):
                raise ConfigError(
                    f"optimization.select: {len(readable)} training videos are too few to hold some out; use select: "
                    "val"
                )
            fitted = fitter.fit(f"fold-{fold}", grid, readable[part != fold])
            held_out = self._validate(fitter, fitted, self.train, readable[part == fold])
            folds.append([held_out.top1, held_out.loss, fitted.train_loss])
        top1, loss, train_loss = torch.tensor(folds, dtype=torch.float64).mean(0).tolist()
        return top1, loss, train_loss

    @torch.no_grad()
    def _validate(self, fitter: Fitter, fitted: Fitted, features: Features, indices: Tensor) -> results.Validated:
        """Evaluate the heads on the samples `indices`; held-out training videos are augmented where training is."""
        parts = indices.split(self.global_batch)
        batches = features.batches(parts)

        def predictions() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for batch in progress(
                batches, desc="validation", total=len(parts), unit="batch", off=not self.world.is_main
            ):
                if len(batch):
                    probabilities = ensemble.probabilities(fitter.read_out(fitted.heads, batch.tokens))
                    yield probabilities, batch.labels, batch.indices

        return results.validate(predictions(), self.options.data.num_classes, self.world, features.clips.source)

    def _write(self, head: Head, validated: results.Validated, column: int) -> None:
        head_file.write(self.folder / head_file.NAME, head, self.options.model_dump(mode="json"))
        results.write_predictions(self.folder / "predictions.csv", validated, column, self.val.clips.paths)
        results.draw_confusion(self.folder / "confusion.png", validated, column, self.options.data.num_classes)

    def _excluded(self) -> list[dict[str, str]]:
        excluded = [
            {"split": name, "path": path, "reason": reason}
            for name, features in (("train", self.train), ("val", self.val))
            for path, reason in sorted(features.excluded.items())
        ]
        if excluded and self.world.is_main:
            logger.warning("%d unreadable files were excluded; %s/results.json lists them", len(excluded), self.folder)
        return excluded


class _Log:
    """The log of the final fit in the folder of `probe`, written by rank 0."""

    def __init__(self, probe: Probe, fitter: Fitter):
        self.folder: RunFolder | None = None
        if probe.world.is_main:
            done = fitter.epochs_done(FINAL_STAGE, len(probe._readable()))
            self.folder = RunFolder(probe.folder, probe.options, step=done)
            self.folder.loggers += make_loggers(
                ["tensorboard"], probe.folder, probe.options.model_dump(mode="json"), done
            )

    def write(self, epoch: int, last_epoch: int, heads: list[int], losses: list[float]) -> None:
        if self.folder is not None:
            train_loss = {f"train_loss/{g}": loss for g, loss in zip(heads, losses, strict=True)}
            self.folder.log([{"step": epoch, "last_step": last_epoch, **train_loss}])

    def close(self) -> None:
        if self.folder is not None:
            self.folder.close()
