"""A probe from its options to its results: choose videos, get features, train heads, name the best, validate."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.config import ConfigError
from tubelet.probing import heads as reading
from tubelet.probing import results, split
from tubelet.probing.clips import LabelledClips, train_and_val
from tubelet.probing.encoder import FrozenEncoder, check_clip_size, with_normalization
from tubelet.probing.features import Features
from tubelet.probing.fit import Fitted, Fitter, other_inputs
from tubelet.probing.options import ProbeOptions
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.runtime.progress import progress
from tubelet.runtime.run_folder import RunFolder, check_same_configuration
from tubelet.runtime.watchdog import Watchdog

# Keys that may differ when a folder's probe is continued: they change nothing that is measured.
FREE = (
    "folder",
    "data.num_workers",
    "data.worker_timeout",
    "data.cache",
    "distributed.",
    "optimization.batch_size",  # that of all processes together may not: see checkpoint.check_same_batch_size
    "meta.save_every_minutes",
)
LAST_STAGE = "all"
STATISTICS = 2048
"""Training videos whose mean and standard deviation standardise what a linear head reads."""


def run(options: ProbeOptions, world: World) -> dict[str, Any]:
    """Every task and seed of `options`, each in its folder; what is finished is not done again.

    All processes share the work and get the results, which are those of one process with the same global batch; the
    main one writes them. Returns what `results.json` in `options.folder` holds.
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
        results.write_json(Path(options.folder) / "results.json", {"tasks": measured})
    return {"tasks": measured}


def _labelled(options: ProbeOptions, world: World) -> tuple[LabelledClips, LabelledClips]:
    """The training and validation videos, so that a fault in any list is an error before anything is computed."""
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
    each = [Probe(options.with_seed(seed), encoder, train, val, watchdog).run() for seed in options.seeds]
    summary = results.over_seeds(options.seeds, each)
    if watchdog.world.is_main:
        results.write_json(Path(options.folder) / "results.json", summary)
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
        self.options, self.encoder, self.seed, self.world = options, encoder, options.meta.seed, watchdog.world
        self.folder = Path(options.folder)
        self.global_batch = options.optimization.batch_size * self.world.world_size
        shape = {"segments": options.data.num_segments, "only_mean": options.head == "linear"}
        self.train, self.val = (Features(clips, encoder, watchdog, **shape) for clips in (train, val))
        self.chosen = torch.tensor(split.few_per_class(train.labels, options.data.labels_per_class, self.seed))
        measured = {key: value for key, value in _leaves(options.model_dump()) if not key.startswith(FREE)}
        lists = (train.paths, train.labels, val.paths, val.labels)
        self.inputs = split.fingerprint(measured, self.global_batch, encoder.fingerprint, *lists)

    def run(self) -> dict[str, Any]:
        """What `results.json` holds: measured now, or read where the folder's probe is finished.

        Raises ConfigError when the folder holds a probe of other options, weights or labels.
        """
        finished = self.folder / "results.json"
        if measured := self.world.broadcast_from_rank0(lambda: results.read_json(finished)):
            self._check_same_options()
            checkpoint.check_same_batch_size(measured["global_batch"], self.global_batch, "optimization.batch_size")
            if measured["inputs"] != self.inputs:
                raise other_inputs(self.folder)
            return measured
        started = time.perf_counter()
        self._keep_features()
        extracted = time.perf_counter()
        measured = self._measure()
        measured["seconds"] = {"features": extracted - started, "heads": time.perf_counter() - extracted}
        if self.world.is_main:
            results.write_json(finished, measured)
            shutil.rmtree(self.folder / "checkpoints")  # probe.pt stays; a study makes hundreds of these
        return measured

    def _measure(self) -> dict[str, Any]:
        o = self.options.optimization
        fitter = Fitter(
            options=o,
            features=self.train,
            make_head=self._head_maker(),
            seed=self.seed,
            folder=self.folder,
            global_batch=self.global_batch,
            inputs=self.inputs,
            save_every_minutes=self.options.meta.save_every_minutes,
        )
        self._check_same_options()
        log = None
        if self.world.is_main:
            done = fitter.epochs_done(LAST_STAGE, len(self._usable()))
            log = RunFolder(self.folder, self.options, step=done, free=FREE)
        grid = o.grid()
        rows: list[dict[str, Any]] = [{"lr": lr, "weight_decay": weight_decay} for lr, weight_decay in grid]
        finalists = list(range(len(grid)))
        if o.select == "holdout" and len(grid) > 1:
            self._look_at_holdout(fitter, grid, rows)
            finalists = [max(finalists, key=lambda g: (rows[g]["holdout_top1"], -rows[g]["holdout_loss"]))]

        usable = self._usable()
        last_epoch = fitter.epochs(len(usable))

        def on_epoch(epoch: int, losses: list[float]) -> None:
            if log is not None:
                train_loss = {f"train_loss/{g}": loss for g, loss in zip(finalists, losses, strict=True)}
                log.log([{"step": epoch, "last_step": last_epoch, **train_loss}])

        fitted = fitter.fit(LAST_STAGE, [grid[g] for g in finalists], usable, on_epoch)
        if log is not None:
            log.close()
        validated = self._validate(fitter, fitted, self.val, torch.arange(len(self.val.clips)))
        for column, g in enumerate(finalists):
            rows[g] |= {
                "train_loss": fitted.train_loss[column],
                "train_top1": fitted.train_top1[column],
                "val_top1": validated.top1[column],
                "val_top5": validated.top5[column],
            }
        column = max(range(len(finalists)), key=lambda c: (validated.top1[c], -validated.loss[c]))
        best = finalists[column]
        if self.world.is_main:
            self._write(fitted.heads.heads[column], validated, column)
        return {
            "top1": validated.top1[column],
            "top5": validated.top5[column],
            "train_loss": fitted.train_loss[column],
            "train_top1": fitted.train_top1[column],
            "best_head": {"index": best, "lr": grid[best][0], "weight_decay": grid[best][1]},
            "select": o.select if len(grid) > 1 else None,
            "heads": rows,
            "head": self.options.head,
            "seed": self.seed,
            "num_classes": self.options.data.num_classes,
            "num_train": len(self._usable()),
            "num_val": len(validated.labels),
            "excluded": self._excluded(),
            "encoder": self.encoder.fingerprint,
            "global_batch": self.global_batch,
            "inputs": self.inputs,
        }

    def _check_same_options(self) -> None:
        self.world.broadcast_from_rank0(lambda: check_same_configuration(self.folder, self.options, FREE))

    def _keep_features(self) -> None:
        kept = self.options.data.cache_features
        if not kept:
            return
        folder = self.folder / "features" if kept is True else Path(kept)
        batch_size = self.options.optimization.batch_size
        self.train.keep(self.chosen, folder, batch_size)
        self.val.keep(torch.arange(len(self.val.clips)), folder, batch_size)

    def _usable(self) -> Tensor:
        """The samples to train on, without those known to be unreadable."""
        return self.chosen[self.train.readable(self.chosen)]

    def _head_maker(self) -> Callable[[], nn.Module]:
        """A function that makes a new head of the configured kind."""
        o, num_classes = self.options.optimization, self.options.data.num_classes
        if self.options.head == "linear":
            some = self.chosen[:: -(-len(self.chosen) // STATISTICS)]
            mean, std = self.train.mean_and_std(some.split(self.global_batch), o.attend_across_segments)
            return lambda: reading.LinearHead(mean, std, num_classes)
        return lambda: reading.attentive(self.options.classifier, self.encoder.module, num_classes)

    def _look_at_holdout(self, fitter: Fitter, grid: list[tuple[float, float]], rows: list[dict[str, Any]]) -> None:
        """Into each head's row: its accuracy (percent) and loss on held-out training videos, averaged over folds."""
        o = self.options.optimization
        usable = self._usable()
        labels = [self.train.clips.labels[i] for i in usable.tolist()]
        part = torch.tensor(split.stratified_parts(labels, round(1 / o.holdout_share), self.seed))
        folds = []
        for fold in range(o.holdout_folds):
            if not 0 < (part == fold).sum() < len(part):
                raise ConfigError(
                    f"optimization.select: {len(usable)} training videos are too few to hold some out; use select: val"
                )
            fitted = fitter.fit(f"fold-{fold}", grid, usable[part != fold])
            held_out = self._validate(fitter, fitted, self.train, usable[part == fold])
            folds.append([held_out.top1, held_out.loss, fitted.train_loss])
        means = torch.tensor(folds, dtype=torch.float64).mean(0).T.tolist()
        for row, (top1, loss, train_loss) in zip(rows, means, strict=True):
            row |= {"holdout_top1": top1, "holdout_loss": loss, "holdout_train_loss": train_loss}

    @torch.no_grad()
    def _validate(self, fitter: Fitter, fitted: Fitted, features: Features, indices: Tensor) -> results.Validated:
        """The heads on the samples `indices`; held-out training videos are augmented where training is."""
        parts = indices.split(self.global_batch)
        batches = features.batches(parts)

        def predictions() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for batch in progress(
                batches, desc="validation", total=len(parts), unit="batch", off=not self.world.is_main
            ):
                if len(batch):
                    probabilities = reading.probabilities(fitter.read_out(fitted.heads, batch.tokens))
                    yield probabilities, batch.labels, batch.indices

        return results.validate(predictions(), self.options.data.num_classes, self.world, features.clips.source)

    def _write(self, head: nn.Module, validated: results.Validated, column: int) -> None:
        config = self.options.model_dump(mode="json")
        num_heads = self.options.classifier.num_heads or self.encoder.module.num_heads
        state = {"classifier": head.state_dict(), "num_heads": num_heads, "config": config}
        torch.save(state, self.folder / "probe.pt")
        results.write_predictions(self.folder / "predictions.csv", validated, column, self.val.clips.paths)
        results.draw_confusion(self.folder / "confusion.png", validated, column, self.options.data.num_classes)

    def _excluded(self) -> list[dict[str, str]]:
        excluded = [
            {"split": name, "path": path, "reason": reason}
            for name, features in (("train", self.train), ("val", self.val))
            for path, reason in sorted(features.excluded.items())
        ]
        if excluded and self.world.is_main:
            said = f"{len(excluded)} unreadable files were excluded; {self.folder}/results.json lists them"
            warnings.warn(said, stacklevel=2)
        return excluded


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix[:-1], node
