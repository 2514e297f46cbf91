"""Programs for videos with sound: `python -m app.main --fname configs/audio/<name>.yaml`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from app.audio.data import training_videos, validation_batches, validation_videos
from app.audio.model import build_model
from app.audio.options import Options
from app.audio.retrieval import measure_retrieval
from tubelet.config.addresses import public
from tubelet.data.rows import Mapped
from tubelet.data.sounding_videos import Dataset
from tubelet.data.types import BadFile
from tubelet.objectives.audio_visual import AudioVisual, Synchronisation, VideoSoundAlignment
from tubelet.probing import fine_tuning, heads, results
from tubelet.runtime.distributed import World
from tubelet.runtime.files import write_json
from tubelet.runtime.precision import autocast
from tubelet.runtime.watchdog import Watchdog


def main(options: Options, world: World) -> None:
    """Train to the last epoch, or continue the run in the folder; then measure it on the validation videos."""
    options = fine_tuning.resolve(options, world)
    videos, validation = training_videos(options), validation_videos(options)
    model = build_model(options).to(world.device)
    bad_files = fine_tuning.train(model, options, videos, options.data, world)
    facts = {
        "num_train": len(videos),
        "bad_train": bad_files.reasons(),
        "modalities": options.modalities,
        "seed": options.meta.seed,
    }
    with Watchdog(world, options.distributed.timeout) as watchdog:
        if isinstance(model, VideoSoundAlignment):
            evaluate_retrieval(options, model, validation, facts, watchdog)
        else:
            evaluate(options, model, validation, facts, watchdog)


def evaluate_retrieval(
    options: Options, model: VideoSoundAlignment, videos: Dataset, facts: dict[str, Any], watchdog: Watchdog
) -> None:
    """Rank the sounds for each validation video and the videos for each sound, and write the results."""
    measured, excluded = measure_retrieval(options, model, videos, watchdog)
    if watchdog.world.is_main:
        write_json(Path(options.folder) / "results.json", {**measured, "excluded": excluded, **facts})


def evaluate(options: Options, model: AudioVisual, videos: Dataset, facts: dict[str, Any], watchdog: Watchdog) -> None:
    """Classify the validation videos, each with each shift for synchronisation; write the predictions and the results.

    Files without sound count: with silence in its place their predictions are among the others, excluded ones are not.
    """
    folder, world = Path(options.folder), watchdog.world
    bad: list[BadFile] = []
    shifts = options.synchronisation.shifts() if isinstance(model, Synchronisation) else [0.0]
    num_classes = len(shifts) if isinstance(model, Synchronisation) else options.data.num_classes
    assert num_classes is not None
    predicted = predictions(options, model, videos, len(shifts), bad, watchdog)
    validated = results.validate(predicted, num_classes, world, options.data.dataset_val)
    bad = [file for part in world.all_gather_object(bad) for file in part]
    if not world.is_main:
        return
    paths = Mapped(public, videos.paths)
    of_samples = [paths[index] for index in range(len(paths)) for _ in shifts]
    results.write_predictions(folder / "predictions.csv", validated, 0, of_samples)
    results.draw_confusion(folder / "confusion.png", validated, 0, num_classes)
    read = {of_samples[index] for index in validated.indices.tolist()}
    measured: dict[str, Any] = {"top1": validated.top1[0], "loss": round(validated.loss[0], 6)}
    if isinstance(model, Synchronisation):
        measured |= {"chance": round(100 / len(shifts), 4), "top1_by_shift": top1_by_shift(validated, shifts)}
    reasons = {file.path: file.reason for file in sorted(bad, key=lambda file: file.path)}
    measured |= {
        "num_val": len(read),
        "excluded": {path: reason for path, reason in reasons.items() if path not in read},
        "silent": {path: reason for path, reason in reasons.items() if path in read},
        **facts,
    }
    write_json(folder / "results.json", measured)


@torch.no_grad()
def predictions(
    options: Options, model: AudioVisual, videos: Dataset, num_shifts: int, bad: list[BadFile], watchdog: Watchdog
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield probabilities, labels and sample numbers of this process's part; append unusable files to `bad`."""
    model.eval()
    batches, device = validation_batches(options, videos, watchdog.world), watchdog.world.device
    dtype = options.dtype_on(device)
    for step, batch in enumerate(batches):
        watchdog.note(f"batch {step + 1} of {len(batches)} of the evaluation")
        bad += batch.bad
        if not len(batch):
            continue
        on_device = batch.to(device)
        for number in range(num_shifts):
            shown = on_device
            if isinstance(model, Synchronisation):
                shown = model.shifted(on_device, [number] * len(batch))
            with autocast(device, dtype):
                logits = model.logits(shown)
            yield heads.probabilities(logits[None, :, None]), shown.labels, batch.indices * num_shifts + number
    model.train()


def top1_by_shift(validated: results.Validated, shifts: list[float]) -> dict[str, float]:
    """Return the accuracy in percent for each shift in seconds."""
    hits = (validated.classes[0, :, 0] == validated.labels).double()
    return {
        f"{shift:+g}": round(100 * float(hits[validated.labels == number].mean()), 4)
        for number, shift in enumerate(shifts)
    }
