"""One probe: extract features, train heads, select one, validate."""

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from tubelet.config import ConfigError
from tubelet.probing import head_file, results, split
from tubelet.probing import heads as ensemble
from tubelet.probing.clips import LabelledClips, LabelledSets
from tubelet.probing.encoder import FrozenEncoder
from tubelet.probing.features import Features
from tubelet.probing.fit import Fitter, HeadsDiverged, Settings, other_inputs, read_out
from tubelet.probing.fit_at_once import AtOnceFitter
from tubelet.probing.heads import FittedHead, Head, Heads, build_head
from tubelet.probing.options import ProbeOptions
from tubelet.runtime import checkpoint
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
"""Training videos from which the mean and standard deviation for linear heads are computed."""

Rows = list[dict[str, Any]]
"""What results.json says of each head."""


class Probe:
    """One probe with one seed, in one folder."""

    def __init__(
        self,
        options: ProbeOptions,
        encoder: FrozenEncoder,
        sets: LabelledSets,
        watchdog: Watchdog,
    ):
        self.options, self.encoder, self.world = options, encoder, watchdog.world
        (self.seed,) = options.seeds
        self.folder = Path(options.folder)
        self.global_batch = options.optimization.batch_size * self.world.world_size
        data, side = options.data, options.optimization.resolution
        self.head_class = ensemble.head_class(options.head)
        self.grid = encoder.module.grid_size(data.frames_per_clip, side, side)
        train, val = sets.train, sets.val
        self.train, self.val = self._features(train, watchdog), self._features(val, watchdog)
        self.shuffled = None if sets.shuffled is None else self._features(sets.shuffled, watchdog)
        self.chosen = torch.tensor(split.labelled_subset(train.labels, data, self.seed))
        lists = (train.paths, train.labels, val.paths, val.labels)
        normalization = (encoder.mean, encoder.std)
        self.inputs = split.fingerprint(VERSION, self.global_batch, encoder.fingerprint, normalization, *lists)

    def _features(self, clips: LabelledClips, watchdog: Watchdog) -> Features:
        segments, reads = self.options.data.num_segments, self.head_class.reads
        return Features(clips, self.encoder, watchdog, segments=segments, reads=reads, grid=self.grid)

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
            checkpoint.check_same_batch_size(finished, self.global_batch, "optimization.batch_size")
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
            if (checkpoints := self.folder / "checkpoints").is_dir():
                shutil.rmtree(checkpoints)  # the trained head is kept; a study makes hundreds of these
        return measured

    def _check_same_options(self) -> None:
        self.world.broadcast_from_rank0(lambda: check_same_configuration(self.folder, self.options))

    def _extract_features(self) -> None:
        """Extract the features once, where `data.cache_features` is set."""
        data, batch_size = self.options.data, self.options.optimization.batch_size
        if data.cache_features:
            folder = self.folder / "features" if data.cache_features is True else Path(data.cache_features)
            self.train.extract(self.chosen, folder, batch_size, data.feature_memory)
            for features in (self.val, self.shuffled):
                if features is not None:
                    features.extract(torch.arange(len(features.clips)), folder, batch_size, data.feature_memory)

    def _measure(self) -> dict[str, Any]:
        """Train the heads, select one, and write its files."""
        grid = self._grid_of_heads()
        rows: Rows = [dict(settings) for settings in grid]
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
        validated = self._validate(fitted.heads, self.val, torch.arange(len(self.val.clips)))
        finite = []
        for column, g in enumerate(finalists):
            figures = fitted.figures[column]
            finite.append(validated.finite[column] and all(map(math.isfinite, figures.values())))
            measured = {**figures, "val_top1": validated.top1[column], "val_top5": validated.top5[column]}
            rows[g] |= measured if finite[-1] else _diverged(measured)
        best = results.best_head(validated.top1, validated.loss, finite)
        if best is None:
            raise HeadsDiverged(self.folder, "in validation")
        if self.world.is_main:
            self._write(fitted.heads.members[best], validated, best)
        index = finalists[best]
        return {
            "top1": validated.top1[best],
            "top5": validated.top5[best],
            **self._on_shuffled_frames(fitted.heads.members[best]),
            **fitted.figures[best],
            "best_head": {"index": index, **grid[index]},
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

    def _grid_of_heads(self) -> list[Settings]:
        if issubclass(self.head_class, FittedHead):
            option = self.head_class.grid_option
            return [{option: value} for value in getattr(self.options.head, option)]
        return [{"lr": lr, "weight_decay": weight_decay} for lr, weight_decay in self.options.optimization.grid()]

    def _fitter(self) -> Fitter | AtOnceFitter:
        o = self.options.optimization
        if issubclass(self.head_class, FittedHead):
            return AtOnceFitter(self.train, self._make_head, o.attend_across_segments, self.global_batch)
        statistics = self._statistics()

        def make_head() -> Head:
            head = self._make_head()
            if statistics is not None:
                head.set_statistics(*statistics)
            return head

        return Fitter(
            options=o,
            features=self.train,
            make_head=make_head,
            seed=self.seed,
            folder=self.folder,
            global_batch=self.global_batch,
            inputs=self.inputs,
            save_every_minutes=self.options.meta.save_every_minutes,
        )

    def _make_head(self, **changes: Any) -> Head:
        """A new head; `changes`: of its options."""
        options = self.options.head.model_copy(update=changes)
        return build_head(options, self.encoder.module, self.options.data.num_classes, num_slots=self._num_slots)

    @property
    def _num_slots(self) -> int:
        """Time slots of a prediction."""
        across = self.options.optimization.attend_across_segments
        return self.grid.t * (self.options.data.num_segments if across else 1)

    def _statistics(self) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation of the means that a head reads; None for a head that reads all tokens."""
        if self.head_class.reads == "tokens":
            return None
        num_slots = self._num_slots if self.head_class.reads == "slots" else 1
        across = self.options.optimization.attend_across_segments
        sample = self.chosen[:: -(-len(self.chosen) // MAX_STATISTICS)]
        means, _ = self.train.gather(
            sample.split(self.global_batch),
            lambda tokens: ensemble.pool(ensemble.per_prediction(tokens, across), num_slots).flatten(2),
        )
        means = means.flatten(0, 1)
        return means.mean(0), means.std(0, correction=min(1, len(means) - 1))  # of a single video 0, not NaN

    def _readable(self) -> Tensor:
        """The samples to train on, without those known to be unreadable."""
        return self.chosen[self.train.readable(self.chosen)]

    def _finalists(self, fitter: Fitter | AtOnceFitter, grid: list[Settings], rows: Rows) -> list[int]:
        """The heads that are trained on all training videos: the best one of held-out videos, or all of them."""
        if self.options.optimization.select != "holdout" or len(grid) == 1:
            return list(range(len(grid)))
        measured = self._holdout(fitter, grid)
        finite = [all(map(math.isfinite, figures.values())) for figures in measured]
        for row, figures, is_finite in zip(rows, measured, finite, strict=True):
            row |= figures if is_finite else _diverged(figures)
        top1, loss = ([figures[f"holdout_{name}"] for figures in measured] for name in ("top1", "loss"))
        best = results.best_head(top1, loss, finite)
        if best is None:
            raise HeadsDiverged(self.folder, "on held-out videos")
        return [best]

    def _holdout(self, fitter: Fitter | AtOnceFitter, grid: list[Settings]) -> list[dict[str, float]]:
        """Measure each head on held-out training videos.

        Returns:
            Of each head, `holdout_top1` (percent) and `holdout_loss`, and `holdout_train_loss` where it has a training
            loss; means over folds.
        """
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
            held_out = self._validate(fitted.heads, self.train, readable[part == fold])
            folds.append(
                [
                    {"top1": top1, "loss": loss, **{k: v for k, v in figures.items() if k == "train_loss"}}
                    for top1, loss, figures in zip(held_out.top1, held_out.loss, fitted.figures, strict=True)
                ]
            )
        return [
            {f"holdout_{name}": fmean(figures[name] for figures in of_head) for name in of_head[0]}
            for of_head in zip(*folds, strict=True)
        ]

    def _on_shuffled_frames(self, head: Head) -> dict[str, float]:
        """`shuffled_top1` of a trained head, where `evaluation.shuffle_frames` is set."""
        if self.shuffled is None:
            return {}
        samples = torch.arange(len(self.shuffled.clips))
        validated = self._validate(ensemble.Heads([head]), self.shuffled, samples)
        if not validated.finite[0]:
            raise HeadsDiverged(self.folder, "on shuffled frames")
        return {"shuffled_top1": validated.top1[0]}

    @torch.no_grad()
    def _validate(self, heads: Heads, features: Features, indices: Tensor) -> results.Validated:
        """Evaluate the heads on the samples `indices`; held-out training videos are augmented where training is."""
        across = self.options.optimization.attend_across_segments
        parts = indices.split(self.global_batch)
        batches = features.batches(parts)

        def predictions() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
            for batch in progress(
                batches, desc="validation", total=len(parts), unit="batch", off=not self.world.is_main
            ):
                if len(batch):
                    logits = read_out(heads, batch.tokens, self.encoder.dtype, across)
                    yield ensemble.probabilities(logits), batch.labels, batch.indices

        return results.validate(predictions(), self.options.data.num_classes, self.world, features.clips.source)

    def _write(self, head: Head, validated: results.Validated, column: int) -> None:
        head_file.write(self.folder / head_file.NAME, head, self.options.model_dump(mode="json"))
        results.write_predictions(self.folder / "predictions.csv", validated, column, self.val.clips.paths)
        results.write_classes(self.folder, self.val.clips.classes)
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


def _diverged(figures: dict[str, Any]) -> dict[str, Any]:
    """Return what results.json says of a head whose `figures` are not finite."""
    return {**dict.fromkeys(figures), "diverged": True}


class _Log:
    """The log of the final fit in the folder of `probe`, written by rank 0."""

    def __init__(self, probe: Probe, fitter: Fitter | AtOnceFitter):
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
