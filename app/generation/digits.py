"""Are the digits of predicted Moving MNIST frames recognisable?"""

from collections.abc import Mapping
from typing import Any

import torch

from app.generation.options import Options
from tubelet.config import ConfigError
from tubelet.data.moving_mnist import read_file, read_labels
from tubelet.generation.forecasts import Rollout
from tubelet.generation.recognition import (
    TEST,
    TRAINING,
    DigitClips,
    Recognition,
    single_digit_accuracy,
    train_classifier,
)
from tubelet.runtime.distributed import World
from tubelet.runtime.progress import progress


def labelled_clips(options: Options) -> tuple[DigitClips, DigitClips]:
    """Return clips of the digits for training and for testing.

    Raises:
        ConfigError: The first entry of `data.train` or `data.test` is no file of MNIST's images with labels beside it.
    """
    clips = []
    for part, entry in ((TRAINING, options.data.train[0]), (TEST, options.data.test[0])):
        if read_file(entry).ndim == 4:
            raise ConfigError(f"evaluation.digits: {entry} holds clips without labels; name MNIST's images first")
        clips.append(DigitClips(read_file(entry), read_labels(entry), options.meta.seed, part))
    return clips[0], clips[1]


@torch.no_grad()
def measure_digits(forecasts: Mapping[str, Rollout], options: Options, world: World) -> dict[str, Any]:
    """Train a classifier of digits and measure its accuracy on each predicted frame; `truth` is the highest possible.

    Args:
        forecasts: From frames seen and a number of frames to the frames that follow.
        options: `data.train[0]` has the digits for the classifier, `data.test[0]` those of the clips.
        world: The processes that share the clips.
    """
    data, ahead = options.data, options.num_predicted()
    train, test = labelled_clips(options)
    with torch.enable_grad():
        classifier = train_classifier(train, options.evaluation.classifier_steps)
    single = single_digit_accuracy(classifier, test.digits, test.labels)
    classifier.to(world.device)
    recognition = {name: Recognition(classifier, test.size, ahead) for name in ("truth", *forecasts)}
    number = options.evaluation.num_clips or len(test.digits)
    batches = range(0, number, data.batch_size)[world.rank :: world.world_size]
    for first in progress(batches, desc="digits", unit="batch", off=not world.is_main):
        count = min(data.batch_size, number - first)
        frames, classes, corners = test(first, count, data.num_frames + ahead)
        seen, future = frames.to(world.device).tensor_split([data.num_frames], dim=2)
        corners = corners[:, :, data.num_frames :]
        recognition["truth"].update(future, classes, corners)
        for name, forecast in forecasts.items():
            recognition[name].update(forecast(seen, ahead), classes, corners)
    for counts in recognition.values():
        counts.gather(world.sum, world.device)
    counted, apart = recognition["truth"].total.tolist()
    return {
        "clips": number,
        "single_digits": round(single, 4),
        "fraction_apart": [round(part / whole, 4) for part, whole in zip(apart, counted, strict=True)],
        **{name: counts.compute() for name, counts in recognition.items()},
    }
