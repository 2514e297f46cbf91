"""Evaluation of future-frame prediction: metrics of the model and of non-learned baselines, and figures."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.generation.answers import measured_forecasts, point_forecast, shown_forecasts
from app.generation.digits import labelled_clips, measure_digits
from app.generation.distances import FeatureDistances
from app.generation.options import Options
from tubelet.config import ConfigError, naming
from tubelet.config.registry import find
from tubelet.data import Batch, Draw, Sample, evenly_spaced
from tubelet.data.collate import collate
from tubelet.data.loader import make_eval_loader
from tubelet.data.transforms import EvalTransform
from tubelet.generation.forecasts import BASELINES, Rollout, copy_last, roll_out
from tubelet.generation.metrics import FrameMetrics
from tubelet.objectives.frame_prediction import to_frames
from tubelet.runtime.distributed import World
from tubelet.runtime.files import write_json
from tubelet.runtime.progress import progress
from tubelet.runtime.run_folder import read_log


class HeldOutClips:
    """Clips of the test set: `number` evenly spaced ones, always the same; all if None."""

    def __init__(self, options: Options, number: int | None, num_frames: int):
        data = options.data
        with naming("data.test", instead_of="data.datasets"):
            self._dataset = find("data", data.format.name).Dataset(
                data.clips(data.test, num_frames, at_random=False), EvalTransform(data.crop_size), on_error="exclude"
            )
        self.indices = evenly_spaced(len(self._dataset), number or len(self._dataset)).tolist()
        self.unreadable = self._dataset.unreadable

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, draw: Draw) -> Sample:
        return self._dataset[dataclasses.replace(draw, index=self.indices[draw.index])]

    def first(self, number: int) -> Batch:
        """Return the first `number` readable clips. Raises ConfigError if there is none."""
        samples: list[Sample] = []
        readable = 0
        for index in range(len(self)):
            samples.append(self[Draw(0, 0, index, index)])
            readable += not samples[-1].excluded
            if readable == number:
                break
        if not readable:
            bad = samples[0].bad[0]
            raise ConfigError(f"data.test: none of the {len(self)} clips can be used; {bad.path}: {bad.reason}")
        return collate(samples, step=0)


class HeldOutError:
    """Mean squared error of the model on a few test clips, to watch during training.

    Raises:
        ConfigError: None of these clips can be read.
    """

    def __init__(self, options: Options, device: torch.device):
        seen, ahead = options.data.num_frames, options.data.num_target_frames
        clips = HeldOutClips(options, options.logging.monitor_clips, seen + ahead)
        frames = to_frames(clips.first(len(clips)).clips.to(device), options.data.channels)
        self.seen, self.future = frames[:, :, :seen], frames[:, :, seen:]
        self.batch_size = options.data.batch_size

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        training = model.training
        model.eval()
        batches = zip(self.seen.split(self.batch_size), self.future.split(self.batch_size), strict=True)
        forecast = point_forecast(model)
        errors = [(forecast(seen).clamp(0, 1) - future).square().mean((1, 2, 3, 4)) for seen, future in batches]
        model.train(training)
        return float(torch.cat(errors).mean())


def check_evaluation(options: Options, world: World) -> None:
    """Read what `evaluation` needs besides clips. Raises ConfigError where it is missing or does not fit."""
    if options.evaluation.features is not None:
        FeatureDistances(options, (), world)
    if options.evaluation.digits:
        labelled_clips(options)


def evaluate(model: nn.Module, clips: HeldOutClips, options: Options, world: World) -> None:
    """Write `results.json`, `prediction.png` and `prediction.gif` into the run folder, unless they are there."""
    folder = Path(options.folder)
    request = options.evaluation.model_dump(mode="json") | {"test": options.data.test}
    if world.broadcast_from_rank0(lambda: _is_done(folder / "results.json", request)):
        return
    model.eval()
    measured = measure(model, clips, options, world)
    if world.is_main:
        draw_prediction(folder, model, clips, options, world.device)
        seconds = sum(line.get("step_seconds", 0.0) for line in read_log(folder))
        results = {"evaluation": request, "steps": options.optimization.steps, "train_seconds": round(seconds, 1)}
        write_json(folder / "results.json", results | measured)


@torch.no_grad()
def measure(model: nn.Module, clips: HeldOutClips, options: Options, world: World) -> dict[str, Any]:
    """Measure the model and each baseline, and by how many percent the error of the model is lower."""
    ahead = options.num_predicted()
    of_model = {name: partial(roll_out, forecast) for name, forecast in measured_forecasts(model).items()}
    forecasts: dict[str, Rollout] = {**of_model, **BASELINES}
    metrics = {name: FrameMetrics(ahead) for name in forecasts}
    distances = None if options.evaluation.features is None else FeatureDistances(options, list(forecasts), world)
    excluded = []
    for batch in _batches(clips, options, world):
        excluded += [{"path": bad.path, "reason": bad.reason} for bad in batch.bad]
        if not len(batch):
            continue
        frames = to_frames(batch.clips.to(world.device), options.data.channels)
        seen, future = frames[:, :, : options.data.num_frames], frames[:, :, options.data.num_frames :]
        for name, forecast in forecasts.items():
            predicted = forecast(seen, ahead)
            metrics[name].update(predicted, future)
            if distances is not None:
                distances.update(name, predicted)
        if distances is not None:
            distances.update_truth(future)
    for metric in metrics.values():
        metric.gather(world.sum, world.device)
    results = {name: metric.compute() for name, metric in metrics.items()}
    below = {name: _percent_below(results["model"]["mse"], results[name]["mse"]) for name in BASELINES}
    everywhere: list[dict[str, str]] = sum(world.all_gather_object(excluded), [])
    if distances is not None:
        results["frechet_distance"] = distances.compute()
    if options.evaluation.digits:
        results["digits"] = measure_digits({**of_model, "copy_last": copy_last}, options, world)
    return {"clips": metrics["model"].clips, "excluded": everywhere, "mse_below_percent": below, **results}


@torch.no_grad()
def draw_prediction(
    folder: Path, model: nn.Module, clips: HeldOutClips, options: Options, device: torch.device
) -> None:
    """`prediction.png` and `prediction.gif` of the first clips: frames seen, truth, and each draw of the model."""
    from tubelet.generation import pictures  # matplotlib takes a second to import, and only the end of a run needs it

    frames = to_frames(clips.first(options.evaluation.pictures).clips.to(device), options.data.channels)
    seen, future = frames[:, :, : options.data.num_frames], frames[:, :, options.data.num_frames :]
    ahead = {"truth": future}
    for title, forecast in shown_forecasts(model, options.evaluation.draws).items():
        ahead[title] = roll_out(forecast, seen, options.num_predicted())
    shown = {title: pictures.to_pixels(of_title) for title, of_title in ahead.items()}
    pictures.filmstrip(pictures.to_pixels(seen), shown).save(folder / "prediction.png", optimize=True)
    (folder / "prediction.gif").write_bytes(pictures.animation(pictures.to_pixels(seen), shown, options.evaluation.fps))


def _batches(clips: HeldOutClips, options: Options, world: World) -> Iterator[Batch]:
    data = options.data
    loader = make_eval_loader(
        clips,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        world=world,
        timeout=data.worker_timeout,
    )
    yield from progress(loader, desc="test", total=len(loader), unit="batch", off=not world.is_main)


def _percent_below(error: float, other: float) -> float | None:
    """Return None if `other` is zero, as for copying frames without motion."""
    return round(100 * (1 - error / other), 2) if other > 0 else None


def _is_done(path: Path, request: dict[str, Any]) -> bool:
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["evaluation"] == request
