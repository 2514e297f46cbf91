"""The videos of a run, with their sound."""

from typing import Any, Literal

from app.audio.options import Options
from tubelet.config import check, naming
from tubelet.data import DataConfig
from tubelet.data.loader import make_eval_loader
from tubelet.data.sounding_videos import Dataset
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.data.workers import Loader
from tubelet.objectives.audio_visual import largest
from tubelet.probing.clips import clip_options
from tubelet.probing.split import check_labels
from tubelet.runtime.distributed import World


def training_videos(options: Options) -> Dataset:
    """Return the training videos. Raises ConfigError where the list cannot be used."""
    side, augmentation = options.optimization.resolution, options.data_aug
    transform = EvalTransform(side) if augmentation is None else TrainTransform(augmentation, side)
    random, seed = options.data.random_clips, options.meta.seed
    return _videos(options, "dataset_train", transform, random=random, seed=seed, on_error="replace")


def validation_videos(options: Options) -> Dataset:
    """Return the validation videos. Raises ConfigError where the list cannot be used."""
    return _videos(options, "dataset_val", EvalTransform(options.optimization.resolution), on_error="exclude")


def validation_batches(options: Options, videos: Dataset, world: World) -> Loader:
    """Return the batches of this process's part of the validation videos."""
    return make_eval_loader(
        videos,
        batch_size=options.evaluation.batch_size,
        num_workers=options.data.num_workers,
        world=world,
        timeout=options.data.worker_timeout,
    )


def _videos(
    options: Options,
    key: Literal["dataset_train", "dataset_val"],
    transform: EvalTransform | TrainTransform,
    *,
    random: bool = False,
    **kwargs: Any,
) -> Dataset:
    data, source = options.data, f"data.{key}: {getattr(options.data, key)}"
    raw = clip_options(
        data, [getattr(data, key)], num_clips=1, resolution=options.optimization.resolution, random=random
    )
    raw["format"] = {"name": "sounding_videos", **options.sound.model_dump()}
    raw |= {"num_workers": data.num_workers, "max_bad_fraction": data.max_bad_fraction}
    synchronise = options.task == "synchronisation"
    margin = largest(options.synchronisation.shifts()) if synchronise else 0.0
    with naming(f"data.{key}", instead_of="data.datasets"):
        config = check(raw, DataConfig, source)
        videos = Dataset(config, transform, modalities=options.modalities, margin=margin, **kwargs)
        if options.task == "classification":
            assert data.num_classes is not None
            check_labels(videos.labels, videos.paths, data.num_classes, source)
    return videos
