"""Draw features of hidden tokens clip by clip, and compare them with the truth and with other forecasts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evals.predictor_calibration.pretraining import FeaturePrediction
from tubelet.config import ConfigError
from tubelet.config.registry import find
from tubelet.data import evenly_spaced
from tubelet.data.loader import make_eval_loader
from tubelet.data.transforms import EvalTransform
from tubelet.generation.calibration import SCORES, Calibration, forecast_scores, random_directions
from tubelet.masks import build_collator
from tubelet.runtime.distributed import ONE_PROCESS, World
from tubelet.runtime.progress import progress
from tubelet.runtime.seeds import Purpose, numpy_generator, torch_generator
from tubelet.runtime.watchdog import Watchdog

if TYPE_CHECKING:
    from evals.predictor_calibration.eval import Options

ONE_PREDICTION = {"one_step": "climatology_mean", "mask_tokens": "mask_tokens_climatology_mean"}
"""Forecasts that are one prediction -> the baseline of their skill. That of the samples is `climatology`."""
Scores = dict[str, dict[str, list[float]]]
"""Forecast -> score -> one number for each clip and mask."""


class Ranks:
    """Ranks of the truth among the draws of a sampler, and those of one draw more, which a calibrated sampler has."""

    def __init__(self, draws: int):
        self.of_truth, self.of_draw = Calibration(draws), Calibration(draws)

    def merge(self, others: Sequence[Ranks]) -> None:
        """Add the ranks of other processes."""
        self.of_truth.merge(other.of_truth for other in others)
        self.of_draw.merge(other.of_draw for other in others)


@dataclass
class Measured:
    """What has been measured on some clips.

    Attributes:
        ranks: Sampler -> ranks.
        scores: Forecast -> score -> one number for each clip and mask.
        clips: Number of clips.
    """

    ranks: dict[str, Ranks]
    scores: Scores = field(default_factory=dict)
    clips: int = 0

    @classmethod
    def merged(cls, parts: Sequence[Measured]) -> Measured:
        """Return what all processes have measured together."""
        total, *others = parts
        for name, ranks in total.ranks.items():
            ranks.merge([part.ranks[name] for part in others])
        for part in others:
            for name, of_forecast in part.scores.items():
                for key, numbers in of_forecast.items():
                    total.scores.setdefault(name, {}).setdefault(key, []).extend(numbers)
        total.clips = sum(part.clips for part in parts)
        return total


class Measurement:
    """The models, and the clips that they are measured on.

    Args:
        options: The program's options.
        model: Run with noised targets.
        reference: Run with mask tokens; None for none.
        watchdog: Of the run.

    Raises:
        ConfigError: There are too few clips, or the masks do not fit them.
    """

    def __init__(
        self, options: Options, model: FeaturePrediction, reference: FeaturePrediction | None, watchdog: Watchdog
    ):
        self.options, self.model, self.reference = options, model, reference
        self.watchdog, self.world = watchdog, watchdog.world
        data = model.run.data
        try:
            self.masks = build_collator(options.mask or model.run.mask, data.clip_shape)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        changes = {name: getattr(options.data, name) for name in ("datasets", "cache")}
        changes |= {
            "datasets_weights": None,
            "weight_by_duration": False,
            "num_clips": 1,
            "random_clip_sampling": False,
        }
        self.dataset = find("data", data.format.name).Dataset(
            data.model_copy(update=changes), EvalTransform(data.crop_size), on_error="exclude"
        )
        self.climatology, self.measured = self._split()
        self.unreadable: dict[str, str] = {}
        self._directions_by_dim: dict[int, Tensor] = {}

    def _split(self) -> tuple[list[int], list[int]]:
        """Return the indices of the clips of the climatology, and of those that are measured."""
        draws = self.options.draws
        if len(self.dataset) <= draws:
            raise ConfigError(
                f"data.datasets: {len(self.dataset)} clips are too few: {draws} (`draws`) are the climatology, and "
                "others are measured"
            )
        clips = evenly_spaced(len(self.dataset), self.options.data.num_clips + draws).tolist()
        climatology = {clips[i] for i in evenly_spaced(len(clips), draws).tolist()}
        return sorted(climatology), [index for index in clips if index not in climatology]

    @torch.no_grad()
    def run(self) -> dict[str, Any]:
        """Measure all clips; return the content of `results.json`, in every process."""
        climatologies = [self._climatology(m) for m in (self.model, self.reference) if m is not None]
        local = Measured({sampler.name: Ranks(self.options.draws) for sampler in self.options.samplers})
        for number, clip in self._read(self.measured, "clips", self.world):
            self._measure(number, clip, climatologies, local)
        self.watchdog.note("waiting for the other processes")
        parts = self.world.all_gather_object((local, self.unreadable))
        unreadable = {path: reason for _, files in parts for path, reason in files.items()}
        measured = Measured.merged([part for part, _ in parts])
        if not measured.clips:
            raise ConfigError(f"data.datasets: no clip can be read; {next(iter(unreadable.items()))}")
        return {
            "clips": measured.clips,
            "masks": len(self.masks),
            "draws": self.options.draws,
            **self._summary(measured),
            "unreadable": unreadable,
        }

    def _climatology(self, model: FeaturePrediction) -> Tensor:
        """Return the features of all tokens of the clips of the climatology [n, N, D], in every process."""
        features = [model.features(clip) for _, clip in self._read(self.climatology, "climatology")]
        if len(features) < 2:
            raise ConfigError(f"data.datasets: only {len(features)} of {len(self.climatology)} clips can be read")
        return torch.stack(features)

    def _measure(self, number: int, clip: Tensor, climatologies: list[Tensor], measured: Measured) -> None:
        """Measure a clip under each mask, and add it to `measured`."""
        o, device = self.options, self.world.device

        def generator(purpose: str) -> torch.Generator:
            return torch_generator(o.seed, purpose, number, index, device=device)

        def score(name: str, forecast: Tensor, truth: Tensor) -> None:
            for key, value in forecast_scores(forecast, truth, self._directions(truth)).items():
                measured.scores.setdefault(name, {}).setdefault(key, []).append(value)

        measured.clips += 1
        truths = [m.features(clip) for m in (self.model, self.reference) if m is not None]
        masks = self.masks.sample_masks(1, numpy_generator(o.seed, Purpose.MASKS, number, 0))
        for index, (seen, hidden) in enumerate(zip(*masks, strict=True)):
            seen, hidden = seen.to(device), hidden.to(device)
            context = self.model.context(clip, seen)
            truth, ties = truths[0][hidden[0]], generator("ties")
            for sampler in o.samplers:
                # One draw more, which is ranked as if it were the truth: the result of calibrated draws.
                draws = self.model.sample(
                    context, seen, hidden, sampler.steps, o.draws + 1, generator("draws"), sampler.eta
                )
                ranks = measured.ranks[sampler.name]
                ranks.of_truth.add(draws[:-1], truth, self._directions(truth), ties)
                ranks.of_draw.add(draws[:-1], draws[-1], self._directions(truth), ties)
            estimates = self.model.sample(context, seen, hidden, 1, o.draws, generator("draws"))
            score("one_step", estimates.mean(0, keepdim=True), truth)
            score("climatology", climatologies[0][:, hidden[0]], truth)
            score("climatology_mean", climatologies[0][:, hidden[0]].mean(0, keepdim=True), truth)
            if self.reference is not None:
                truth = truths[1][hidden[0]]
                context = self.reference.context(clip, seen)
                score("mask_tokens", self.reference.predict(context, seen, hidden, index)[None], truth)
                score("mask_tokens_climatology_mean", climatologies[1][:, hidden[0]].mean(0, keepdim=True), truth)

    def _directions(self, truth: Tensor) -> Tensor:
        """Return the directions [D, K] for features [Kt, D], always the same."""
        dim = truth.shape[-1]
        if dim not in self._directions_by_dim:
            generator = torch_generator(self.options.seed, "directions", device=truth.device)
            self._directions_by_dim[dim] = random_directions(dim, self.options.directions, generator)
        return self._directions_by_dim[dim]

    def _summary(self, measured: Measured) -> dict[str, Any]:
        samplers, means = {}, _mean(measured.scores)
        for name, ranks in measured.ranks.items():
            samplers[name] = ranks.of_truth.summary(self.options.coverage)
            control = ranks.of_draw.summary(self.options.coverage)
            for ranked, of_truth in samplers[name]["ranks"].items():
                of_truth["deviation_of_a_draw"] = control["ranks"][ranked]["deviation"]
            samplers[name]["skill"] = _skill(samplers[name], means["climatology"])
        forecasts: dict[str, Any] = {**means}
        for name, baseline in ONE_PREDICTION.items():
            if name in means:
                forecasts[name] = means[name] | {"skill": _skill(means[name], means[baseline])}
        return {"samplers": samplers, "forecasts": forecasts}

    def _read(self, indices: list[int], what: str, world: World = ONE_PROCESS) -> Iterator[tuple[int, Tensor]]:
        """Yield this process's readable clips, uint8 [1, C, T, H, W] on the device, and their numbers."""
        data = self.options.data
        loader = make_eval_loader(
            self.dataset,
            batch_size=1,
            indices=indices,
            num_workers=min(data.num_workers, len(indices)),
            world=world,
            timeout=data.worker_timeout,
        )
        bar = progress(loader, desc=what, total=len(loader), unit="clip", off=not self.world.is_main)
        for number, batch in enumerate(bar):
            self.watchdog.note(f"{what}: clip {number + 1} of {len(loader)}")
            self.unreadable |= {file.path: file.reason for file in batch.bad}
            if len(batch):
                yield world.rank + number * world.world_size, batch.clips.to(self.world.device)


def _skill(scores: dict[str, float], baseline: dict[str, float]) -> dict[str, float]:
    """Return by which fraction each score is below that of the baseline."""
    return {key: 1 - scores[key] / baseline[key] for key in SCORES}


def _mean(scores: Scores) -> dict[str, dict[str, float]]:
    """Return the mean scores of each forecast over clips and masks."""
    return {name: {key: math.fsum(column) / len(column) for key, column in of.items()} for name, of in scores.items()}
