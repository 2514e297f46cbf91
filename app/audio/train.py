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
from tubelet.data.streams import SampleStream
from tubelet.data.types import BadFile
from tubelet.objectives.audio_visual import AudioVisual, Synchronisation, VideoSoundAlignment
from tubelet.probing import heads, results
from tubelet.probing.encoder import with_normalization
from tubelet.probing.fine_tuning import fit, make_trainer
from tubelet.runtime.distributed import World, autocast
from tubelet.runtime.files import write_json
from tubelet.runtime.run_folder import check_same_configuration
from tubelet.training.schedules import Schedule


def main(options: Options, world: World) -> None:
    """Train to the last epoch, or continue the run in the folder; then measure it on the validation videos."""
    options = world.broadcast_from_rank0(lambda: with_normalization(options))
    folder = Path(options.folder)
    world.broadcast_from_rank0(lambda: check_same_configuration(folder, options))
    videos, validation = training_videos(options), validation_videos(options)
    model = build_model(options).to(world.device)
    global_batch = options.optimization.batch_size * world.world_size
    stream = SampleStream(videos.sizes, None, global_batch, options.meta.seed)
    o, steps = options.optimization, stream.steps_per_pass
    schedule, trained = Schedule(o, o.num_epochs * steps, steps), None if model.frozen else model.encoder
    trainer = make_trainer(model, options, schedule, global_batch, world, encoder=trained)
    data = options.data
    bad_files = fit(trainer, data, videos, stream, data.num_workers, data.max_bad_fraction)
    facts = {
        "num_train": len(videos),
        "bad_train": bad_files.reasons(),
        "modalities": options.modalities,
        "seed": options.meta.seed,
    }
    if isinstance(model, VideoSoundAlignment):
        evaluate_retrieval(options, model, validation, facts, world)
    else:
        evaluate(options, model, validation, facts, world)


def evaluate_retrieval(
    options: Options, model: VideoSoundAlignment, videos: Dataset, facts: dict[str, Any], world: World
) -> None:
    """Rank the sounds for each validation video and the videos for each sound, and write the results."""
    bad: list[BadFile] = []
    measured = measure_retrieval(options, model, videos, bad, world)
    excluded = {file.path: file.reason for part in world.all_gather_object(bad) for file in part}
    if world.is_main:
        write_json(Path(options.folder) / "results.json", {**measured, "excluded": excluded, **facts})


def evaluate(options: Options, model: AudioVisual, videos: Dataset, facts: dict[str, Any], world: World) -> None:
    """Classify the validation videos, each with each shift for synchronisation; write the predictions and the results.

    Files without sound count: with silence in its place their predictions are among the others, excluded ones are not.
    """
    folder, bad = Path(options.folder), []
    shifts = options.synchronisation.shifts() if isinstance(model, Synchronisation) else [0.0]
    num_classes = len(shifts) if isinstance(model, Synchronisation) else options.data.num_classes
    assert num_classes is not None
    predicted = predictions(options, model, videos, len(shifts), bad, world)
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
    options: Options, model: AudioVisual, videos: Dataset, num_shifts: int, bad: list[BadFile], world: World
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield probabilities, labels and sample numbers of this process's part; append unusable files to `bad`."""
    model.eval()
    for batch in validation_batches(options, videos, bad, world):
        on_device = batch.to(world.device)
        for number in range(num_shifts):
            shown = on_device
            if isinstance(model, Synchronisation):
                shown = model.shifted(on_device, [number] * len(batch))
            with autocast(world.device, options.dtype):
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
