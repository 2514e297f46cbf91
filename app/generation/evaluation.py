"""What a trained model predicts, measured beside rules that need no model, and drawn."""

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from app.generation.options import Options
from tubelet.config import ConfigError
from tubelet.config.registry import find
from tubelet.data import Batch, Draw, Sample, evenly_spaced
from tubelet.data.loader import collate, make_eval_loader
from tubelet.data.transforms import EvalTransform
from tubelet.generation.forecasts import RULES, roll_out
from tubelet.generation.metrics import FrameMetrics
from tubelet.runtime.distributed import World
from tubelet.runtime.progress import progress
from tubelet.runtime.run_folder import read_log, write_atomic


class HeldOutClips:
    """The test set's clips, always the same: `number` of them evenly over it (None: all)."""

    def __init__(self, options: Options, number: int | None, num_frames: int):
        data = options.data
        self._dataset = find("data", data.dataset_type).Dataset(
            data.clips(data.test, num_frames, at_random=False), EvalTransform(data.crop_size), on_error="exclude"
        )
        self.places = evenly_spaced(len(self._dataset), number or len(self._dataset)).tolist()
        self.refused = self._dataset.refused

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, draw: Draw) -> Sample:
        return self._dataset[dataclasses.replace(draw, index=self.places[draw.index])]

    def first(self, number: int) -> Batch:
        """The first `number` that can be read. Raises ConfigError where none can."""
        samples: list[Sample] = []
        readable = 0
        for place in range(len(self)):
            samples.append(self[Draw(0, 0, place, place)])
            readable += not samples[-1].excluded
            if readable == number:
                break
        if not readable:
            bad = samples[0].bad[0]
            raise ConfigError(f"data.test: none of the {len(self)} clips can be used; {bad.path}: {bad.reason}")
        return collate(samples, step=0)


def to_frames(batch: Batch, options: Options, device: torch.device) -> Tensor:
    """Clips as [B, C, T, H, W] from 0 to 1 on the device, grey where `data.channels` is 1."""
    frames = batch.clips.to(device, non_blocking=True).float() / 255
    return frames.mean(dim=1, keepdim=True) if options.data.channels == 1 else frames


class HeldOutError:
    """The model's mean squared error on the first frames ahead of a few test clips, to watch during training."""

    def __init__(self, options: Options, device: torch.device):
        seen, ahead = options.data.num_frames, options.data.num_target_frames
        clips = HeldOutClips(options, options.logging.monitor_clips, seen + ahead)
        frames = to_frames(clips.first(len(clips)), options, device)
        self.seen, self.future = frames[:, :, :seen], frames[:, :, seen:]
        self.batch_size = options.data.batch_size

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        training = model.training
        model.eval()
        batches = zip(self.seen.split(self.batch_size), self.future.split(self.batch_size), strict=True)
        errors = [(model(seen, draw=0).clamp(0, 1) - future).square().mean((1, 2, 3, 4)) for seen, future in batches]
        model.train(training)
        return float(torch.cat(errors).mean())


def evaluate(model: nn.Module, clips: HeldOutClips, options: Options, world: World) -> None:
    """Write `results.json`, `prediction.png` and `prediction.gif` into the run folder, unless they are there."""
    folder = Path(options.folder)
    asked = options.evaluation.model_dump(mode="json") | {"test": options.data.test}
    if world.broadcast_from_rank0(lambda: _answered(folder / "results.json", asked)):
        return
    model.eval()
    measured = measure(model, clips, options, world)
    if world.is_main:
        draw_prediction(folder, model, clips, options, world.device)
        seconds = sum(line.get("step_seconds", 0.0) for line in read_log(folder))
        results = {"evaluation": asked, "steps": options.optimization.steps, "train_seconds": round(seconds, 1)}
        write_atomic(folder / "results.json", json.dumps(results | measured, indent=1) + "\n")


@torch.no_grad()
def measure(model: nn.Module, clips: HeldOutClips, options: Options, world: World) -> dict[str, Any]:
    """The metrics of the model and of each rule, and how far the model's error is below the rules', in percent."""
    ahead = options.frames_ahead()
    forecasts = {"model": partial(roll_out, partial(model, draw=0)), **RULES}
    metrics = {name: FrameMetrics(ahead) for name in forecasts}
    excluded = []
    for batch in _batches(clips, options, world):
        excluded += [{"path": bad.path, "reason": bad.reason} for bad in batch.bad]
        if not len(batch):
            continue
        frames = to_frames(batch, options, world.device)
        seen, future = frames[:, :, : options.data.num_frames], frames[:, :, options.data.num_frames :]
        for name, forecast in forecasts.items():
            metrics[name].update(forecast(seen, ahead), future)
    for metric in metrics.values():
        metric.gather(world.sum, world.device)
    results = {name: metric.compute() for name, metric in metrics.items()}
    below = {rule: _percent_below(results["model"]["mse"], results[rule]["mse"]) for rule in RULES}
    everywhere = sum(world.all_gather_object(excluded), [])
    return {"clips": metrics["model"].clips, "excluded": everywhere, "mse_below_percent": below, **results}


@torch.no_grad()
def draw_prediction(
    folder: Path, model: nn.Module, clips: HeldOutClips, options: Options, device: torch.device
) -> None:
    """`prediction.png` and `prediction.gif` of the first clips: frames seen, truth, and each draw of the model."""
    from tubelet.generation import pictures  # matplotlib takes a second to import, and only the end of a run needs it

    frames = to_frames(clips.first(options.evaluation.pictures), options, device)
    seen, future = frames[:, :, : options.data.num_frames], frames[:, :, options.data.num_frames :]
    ahead = {"truth": future}
    for draw in range(options.evaluation.draws if model.is_stochastic else 1):
        title = f"draw {draw + 1}" if model.is_stochastic else "prediction"
        ahead[title] = roll_out(partial(model, draw=draw), seen, options.frames_ahead())
    shown = {title: pictures.to_pixels(of_title) for title, of_title in ahead.items()}
    pictures.filmstrip(pictures.to_pixels(seen), shown).save(folder / "prediction.png", optimize=True)
    (folder / "prediction.gif").write_bytes(pictures.animation(pictures.to_pixels(seen), shown, options.evaluation.fps))


def _batches(clips: HeldOutClips, options: Options, world: World) -> Iterator[Batch]:
    data = options.data
    loader = make_eval_loader(
        clips,
        batch_size=data.batch_size,
        num_workers=data.num_workers,
        rank=world.rank,
        world_size=world.world_size,
        timeout=data.worker_timeout,
    )
    yield from progress(loader, desc="test", total=len(loader), unit="batch", off=not world.is_main)


def _percent_below(error: float, other: float) -> float | None:
    """None where the other is zero, as that of copying what stands still."""
    return round(100 * (1 - error / other), 2) if other > 0 else None


def _answered(path: Path, asked: dict[str, Any]) -> bool:
    return path.is_file() and json.loads(path.read_text(encoding="utf-8"))["evaluation"] == asked
