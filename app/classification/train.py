"""Supervised training and fine-tuning of an encoder with a head: `python -m app.main --fname <yaml>`.

Data, head, loss and results are those of a probe; here the encoder learns too.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from app.classification.data import Videos
from app.classification.model import build_classifier
from app.classification.options import Options
from tubelet.data import evenly_spaced, to_float
from tubelet.data.bad_files import BadFiles
from tubelet.objectives.supervised import Supervised
from tubelet.probing import fine_tuning, heads, results
from tubelet.probing.clips import LabelledClips
from tubelet.probing.fit import HeadsDiverged
from tubelet.runtime.distributed import World
from tubelet.runtime.files import read_json, write_json
from tubelet.runtime.run_folder import read_log
from tubelet.runtime.watchdog import Watchdog
from tubelet.training.callbacks import BadFileCheck, Callback, Evaluation
from tubelet.training.schedules import Schedule
from tubelet.training.trainer import Trainer

logger = logging.getLogger(__name__)


def main(options: Options, world: World) -> None:
    """Train to the last epoch, or continue the run in the folder; then validate and write what a probe writes."""
    options = fine_tuning.resolve(options, world)
    folder = Path(options.folder)
    videos = Videos(options, world)
    if finished := world.broadcast_from_rank0(lambda: read_json(folder / "results.json")):
        videos.check_same_lists(finished)
        return

    trainer = make_trainer(options, videos, world)
    trainer.resume()
    trainer.fit(videos.steps(trainer.step), callbacks(trainer, videos))

    indices = torch.arange(len(videos.val))
    with Watchdog(world, options.distributed.timeout) as watchdog:
        validated = validate(trainer, videos, videos.val, indices, watchdog)
        shuffled = None if videos.shuffled is None else validate(trainer, videos, videos.shuffled, indices, watchdog)
    if world.is_main:
        write(folder, options, videos, validated, shuffled)


def make_trainer(options: Options, videos: Videos, world: World) -> Trainer:
    """Build the classifier and its trainer."""
    classifier = build_classifier(options)
    schedule = Schedule(options.optimization, videos.last_step, videos.steps_per_epoch)
    return fine_tuning.make_trainer(classifier, options, schedule, world, data_state=videos)


def callbacks(trainer: Trainer, videos: Videos) -> list[Callback]:
    """Return the list of bad files, and the accuracy on some validation videos during training."""
    # data.on_bad_video says what happens to unreadable files; their number never stops the run.
    result: list[Callback] = [BadFileCheck(BadFiles(trainer.folder / "bad_files.txt", 1.0, trainer.world))]
    monitored = evenly_spaced(len(videos.val), trainer.options.logging.monitor_clips)

    def val_top1() -> float | None:
        try:
            return top1(validate(trainer, videos, videos.val, monitored, trainer.watchdog))
        except results.NoneReadable as error:  # the others may be readable
            if trainer.world.is_main:
                logger.warning("val_top1 of the logging.monitor_clips clips is not measured; %s", error)
            return None

    if len(monitored):
        result.append(Evaluation("val_top1", val_top1, at_last_step=False))
    return result


@torch.no_grad()
def validate(
    trainer: Trainer, videos: Videos, clips: LabelledClips, indices: Tensor, watchdog: Watchdog
) -> results.Validated:
    """Classify the samples `indices` of `clips`; each of them is read by one process."""
    classifier = trainer.objective
    assert isinstance(classifier, Supervised)

    def predictions() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for batch in videos.validation(clips, indices, watchdog):
            clips_on_device = batch.clips.to(trainer.world.device, non_blocking=True)
            x = to_float(clips_on_device, classifier.mean, classifier.std)
            with trainer.autocast():
                logits = classifier.logits(x, len(batch))
            yield heads.probabilities(logits[None]), batch.labels, batch.indices

    classifier.eval()
    validated = results.validate(predictions(), videos.options.data.num_classes, trainer.world, clips.source)
    classifier.train()
    return validated


def top1(validated: results.Validated) -> float:
    """Return the accuracy; NaN, which the log shows as null, where the losses are not finite."""
    return validated.top1[0] if validated.finite[0] else math.nan


def write(
    folder: Path, options: Options, videos: Videos, validated: results.Validated, shuffled: results.Validated | None
) -> None:
    """Write `predictions.csv`, `confusion.png` and `results.json`.

    Raises:
        HeadsDiverged: The losses are not finite.
    """
    if not all(part.finite[0] for part in (validated, shuffled) if part is not None):
        raise HeadsDiverged(folder, "in validation")
    num_classes = options.data.num_classes
    results.write_predictions(folder / "predictions.csv", validated, 0, videos.val.paths)
    results.write_classes(folder, videos.val.classes)
    results.draw_confusion(folder / "confusion.png", validated, 0, num_classes)
    measured = {
        "top1": validated.top1[0],
        "top5": validated.top5[0],
        **({} if shuffled is None else {"shuffled_top1": shuffled.top1[0]}),
        **last_epoch(folder, videos),
        "num_train": videos.num_train(),
        "num_val": len(validated.labels),
        "num_classes": num_classes,
        "seed": options.meta.seed,
        "lists": videos.lists,
        "excluded": [{"path": path, "reason": reason} for path, reason in sorted(videos.excluded.items())],
    }
    write_json(folder / "results.json", measured)


def last_epoch(folder: Path, videos: Videos) -> dict[str, float | None]:
    """Return `train_loss` and `train_top1` over the samples of the last epoch; None where a value is not finite."""
    steps = [line for line in read_log(folder) if line["step"] > videos.last_step - videos.steps_per_epoch]
    count = sum(line["samples"] for line in steps)

    def mean(name: str, digits: int) -> float | None:
        if any(line[name] is None for line in steps):  # the log has no NaN
            return None
        return round(sum(line[name] * line["samples"] for line in steps) / count, digits)

    return {"train_loss": mean("loss", 6), "train_top1": mean("train_top1", 4)}
