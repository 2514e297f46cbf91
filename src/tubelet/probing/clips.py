"""Labelled videos of one list, and batches of their clips by sample index."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tubelet.config import ConfigError, check, naming
from tubelet.config.addresses import public
from tubelet.config.registry import find
from tubelet.data import AugConfig, Batch, DataConfig, Draw
from tubelet.data.collate import collate
from tubelet.data.rows import Mapped
from tubelet.data.transforms import EvalTransform, ShuffledFrames, TrainTransform
from tubelet.data.video_dataset import Transform
from tubelet.data.workers import Loader
from tubelet.probing.data_options import ClipsConfig, LabelledDataConfig
from tubelet.probing.split import check_labels, fingerprint, problems_of_labels
from tubelet.runtime.distributed import World

logger = logging.getLogger(__name__)


class LabelledSets(NamedTuple):
    """The videos of a probe or of supervised training: of `data.dataset_train`, augmented, and `data.dataset_val`."""

    train: "LabelledClips"
    val: "LabelledClips"
    shuffled: "LabelledClips | None"
    """`val` with the frames of each clip in random order; None if it is not needed."""


def labelled_sets(
    data: LabelledDataConfig,
    augmentation: AugConfig | None,
    *,
    resolution: int,
    seed: int,
    shuffle_frames: bool,
    world: World,
) -> LabelledSets:
    """Read the lists of the training and validation videos.

    Raises ConfigError where one of them cannot be used, their classes differ, or no validation video can be read.
    """
    pinned, views = world.device.type == "cuda", data.num_views_per_segment
    train = LabelledClips(
        data, "dataset_train", resolution=resolution, augmentation=augmentation, seed=seed, pin_memory=pinned
    )
    val = LabelledClips(data, "dataset_val", resolution=resolution, views=views, pin_memory=pinned)
    _same_classes(train, val)
    if world.is_main:
        for problem in problems_of_labels(train.labels, val.labels, data.num_classes, train.classes):
            logger.warning("%s, %s: %s", train.source, val.source, problem)
    if world.is_main and (both := set(val.paths).intersection(train.paths)):
        logger.warning(
            "%d videos are in data.dataset_train and in data.dataset_val, e.g. %s: the accuracy on them says nothing "
            "about new videos",
            len(both),
            min(both),
        )
    if data.on_bad_video == "exclude":  # otherwise the first unreadable one is an error itself
        world.broadcast_from_rank0(val.check_any_readable)
    shuffled = None
    if shuffle_frames:
        shuffled = LabelledClips(
            data, "dataset_val", resolution=resolution, views=views, shuffle_frames=True, pin_memory=pinned
        )
        _same_classes(train, shuffled)
    return LabelledSets(train, val, shuffled)


def _same_classes(train: "LabelledClips", val: "LabelledClips") -> None:
    """Number the classes of both alike. Raises ConfigError where they are folders, and others."""
    if train.named_in_list and val.named_in_list:
        classes = sorted({*train.classes, *val.classes})
        train.use_classes(classes)
        val.use_classes(classes)
    elif train.classes != val.classes:
        kind, remedy = "class folders", "even if some are empty"
        if train.named_in_list or val.named_in_list:
            kind, remedy = "classes", "as names in both lists, or as numbers in both"
        raise ConfigError(
            f"data.dataset_train has the {kind} {train.classes}, data.dataset_val has {val.classes}; both need the "
            f"same, {remedy}"
        )


def clip_options(
    data: ClipsConfig, datasets: list[str], *, num_clips: int, resolution: int, random: bool
) -> dict[str, Any]:
    """The values of `DataConfig` for `num_clips` clips of each video, at random places or always the same."""
    return {
        "datasets": datasets,
        "num_clips": num_clips,
        "num_frames": data.frames_per_clip,
        "sampling_rate": data.frame_step,
        "fps": data.fps,
        "clip_duration": data.clip_duration,
        "random_clip_sampling": random,
        "allow_clip_overlap": True,
        "format": data.format,
        "decoder": data.decoder.model_dump(),
        "cache": data.cache,
        "crop_size": resolution,
        # Whether patches divide the clip is checked with the encoder.
        "patch_size": 1,
        "tubelet_size": 1,
    }


class LabelledClips:
    """The samples of a list of labelled videos.

    Args:
        data: Section `data` of the configuration.
        key: `dataset_train` or `dataset_val`.
        resolution: Height and width of the clips.
        augmentation: Augmentation of the clips; None for the middle clip of each segment, always the same.
        views: Spatial crops of a clip, without augmentation.
        shuffle_frames: Permute the frames of each clip at random, a function of the sample's index; without
            augmentation.
        seed: Seed of the augmentation.
        pin_memory: Copy batches to pinned memory, for copies to a GPU that do not wait.

    Attributes:
        paths, labels: Of each sample.
        classes: Names of the classes, where folders or the list name them.
        description: Everything that the clips depend on except the files.

    Raises:
        ConfigError: The list cannot be used, or a label is not in 0 .. num_classes - 1.
    """

    def __init__(
        self,
        data: LabelledDataConfig,
        key: str,
        *,
        resolution: int,
        augmentation: AugConfig | None = None,
        views: int = 1,
        shuffle_frames: bool = False,
        seed: int = 0,
        pin_memory: bool = False,
    ):
        self.source = f"data.{key}: {getattr(data, key)}"
        self._data, self._pin_memory = data, pin_memory
        entries, random = [getattr(data, key)], augmentation is not None
        raw = clip_options(data, entries, num_clips=data.num_segments, resolution=resolution, random=random)
        transform: Transform = EvalTransform(resolution, views)
        if augmentation is not None:
            transform = TrainTransform(augmentation, resolution)
        elif shuffle_frames:
            transform = ShuffledFrames(transform)
        options = check(raw | {"num_workers": data.num_workers}, DataConfig, self.source)
        with naming(f"data.{key}", instead_of="data.datasets"):
            self._dataset = find("data", data.format.name).Dataset(
                options, transform, seed=seed, on_error=data.on_bad_video
            )
            # They are written to caches and predictions, so without signatures.
            self.paths: Sequence[str] = Mapped(public, self._dataset.paths)
            check_labels(self.labels, self.paths, data.num_classes, self.source)
        self.description = f"{data.format} {raw | {'datasets': None, 'cache': None}} views {views}"
        if shuffle_frames:  # in another list, a file has another index
            self.description += f" shuffled {fingerprint(self.paths)}"

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> Sequence[int]:
        return self._dataset.labels

    @property
    def classes(self) -> list[str]:
        return getattr(self._dataset, "classes", [])

    @property
    def named_in_list(self) -> bool:
        """Whether a list names the class of each sample."""
        return getattr(self._dataset, "named_in_list", False)

    def use_classes(self, classes: list[str]) -> None:
        """Number the classes as in `classes`, which has all those of this list. Raises ConfigError for too many."""
        self._dataset.use_classes(classes)
        check_labels(self.labels, self.paths, self._data.num_classes, self.source)

    def check_any_readable(self) -> None:
        """Raises ConfigError where none of the videos can be read; stops at the first that can."""
        if not any(len(batch) for batch in self.batches(torch.arange(len(self)).split(1))):
            raise ConfigError(f"{self.source}: none of the {len(self)} videos can be read")

    def batches(self, batches: Sequence[Tensor], epoch: int = 0) -> Iterator[Batch]:
        """The clips of each batch of sample indices, without those of unreadable files that are excluded."""
        yield from self.steps(lambda step: (epoch, batches[step]), range(len(batches)))

    def steps(self, samples_of: Callable[[int], tuple[int, Tensor]], steps: range) -> Iterator[Batch]:
        """The clips of each of `steps`; `samples_of(step)` returns its epoch and sample indices."""
        workers = min(self._data.num_workers, len(steps))
        source = _Batches(self._dataset, samples_of)
        yield from Loader(source, steps, workers, pin_memory=self._pin_memory, timeout=self._data.worker_timeout)


class _Batches:
    """A map from step to batch, so that a worker makes complete batches."""

    def __init__(self, dataset, samples_of: Callable[[int], tuple[int, Tensor]]):
        self.dataset, self.samples_of = dataset, samples_of

    def __getitem__(self, step: int) -> Batch:
        epoch, indices = self.samples_of(step)
        samples = [self.dataset[Draw(step, epoch, index, position)] for position, index in enumerate(indices.tolist())]
        return collate(samples, step)
