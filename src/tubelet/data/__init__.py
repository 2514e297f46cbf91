"""Videos into batches of uint8 clips: the options, and the types that travel from the files to the training loop.

A `SampleStream` says which sample stands at which place of which step; a `Dataset` turns such a `Draw` into a
`Sample`; a loader puts samples and masks together into a `Batch`. Each is a pure function of the seed and its argument,
so nothing has to be replayed when a run is resumed, and the number of workers changes nothing.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator

from tubelet.config import Config, Pair, Triple, UserError
from tubelet.config.registry import name_of

Decoder = Literal["decord", "pyav", "torchcodec"]


class DataConfig(Config):
    """YAML section `data`. The names are V-JEPA's where the meaning is the same."""

    datasets: list[str] = Field(min_length=1)
    """Folders (searched recursively), lists (`path label` a line) or single video files."""
    datasets_weights: list[float] | None = None
    """Share of the draws that each entry of `datasets` gets; None: every sample equally often."""
    dataset_type: name_of("data", "Dataset") = "VideoDataset"
    mask_type: name_of("masks", "MaskCollator") = "multiblock3d"

    batch_size: int = Field(default=24, ge=1)
    """Samples of a step in one process."""
    mask_batch_size: int | None = Field(default=None, ge=1)
    """Samples whose masks are cut to the length of the shortest among them: a multiple of `batch_size`; None: those of
    all processes. V-JEPA cuts by process; among thousands of samples the shortest leaves little context to all."""
    num_workers: int = Field(default=2, ge=0)
    pin_mem: bool = True
    worker_timeout: int = Field(default=300, ge=0)
    """Seconds without a batch from a worker before the run stops with an error; 0: wait for ever."""

    num_clips: int = Field(default=1, ge=1)
    """Clips of a video, one from each of as many equal parts of it."""
    num_frames: int = Field(default=16, ge=1)
    tubelet_size: int = Field(default=2, ge=1)
    sampling_rate: int | None = Field(default=None, ge=1)
    """Take every n-th frame of the file; or give `fps` (frames of the clip a second), or `clip_duration` (seconds)."""
    fps: float | None = Field(default=None, gt=0)
    clip_duration: float | None = Field(default=None, gt=0)
    random_clip_sampling: bool = True
    """Window at random within its part of the video; false: in the middle."""
    allow_clip_overlap: bool = False
    """Where a part is shorter than a clip, let the clips overlap instead of repeating the part's last frame."""
    filter_short_videos: bool = False
    """Skip videos shorter than one clip (reported) instead of repeating their last frame."""
    filter_long_videos: int = Field(default=10**9, ge=1)
    """Skip files of more bytes than this (reported)."""

    crop_size: int = Field(default=224, ge=1)
    patch_size: int = Field(default=16, ge=1)

    decoder: Decoder = "pyav"
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Training stops when more than this share of the draws met an unreadable video."""
    cache: str | None = None
    """Folder for decoded videos (uint8), shared by workers and runs; for small sets of short videos."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        weights = self.datasets_weights
        if weights is not None and len(weights) != len(self.datasets):
            raise ValueError(
                f"datasets_weights has {len(weights)} entries for {len(self.datasets)} datasets; give one for each"
            )
        if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(f"datasets_weights {weights}: weights must not be negative, and one must be above zero")
        given = [name for name in ("sampling_rate", "fps", "clip_duration") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} given; keep exactly one of sampling_rate, fps, clip_duration")
        if not given and self.num_frames > 1:
            raise ValueError("how far apart are the frames of a clip? Give one of sampling_rate, fps, clip_duration")
        if self.crop_size % self.patch_size:
            raise ValueError(
                f"crop_size {self.crop_size} is not divisible by patch_size {self.patch_size}; "
                f"{self._nearest_multiple(self.crop_size, self.patch_size)} is"
            )
        if self.num_frames > 1 and self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames {self.num_frames} is not divisible by tubelet_size {self.tubelet_size}; "
                f"{self._nearest_multiple(self.num_frames, self.tubelet_size)} is"
            )
        if self.mask_batch_size is not None and self.mask_batch_size % self.batch_size:
            raise ValueError(
                f"mask_batch_size {self.mask_batch_size} is no multiple of batch_size {self.batch_size}; "
                f"{self._nearest_multiple(self.mask_batch_size, self.batch_size)} is"
            )
        return self

    @staticmethod
    def _nearest_multiple(value: int, unit: int) -> int:
        return max(1, round(value / unit)) * unit


NORMALIZATION = ("normalize_mean", "normalize_std")


class AugConfig(Config):
    """YAML section `data_aug`: what training does to a clip, the same to all its frames (but see `motion_shift`)."""

    auto_augment: bool = False
    """RandAugment of torchvision."""
    auto_augment_ops: int = Field(default=4, ge=1)
    auto_augment_magnitude: int = Field(default=7, ge=0, le=30)
    motion_shift: bool = False
    """The crop window moves from one random window to another during the clip."""
    random_resize_aspect_ratio: Pair = (0.75, 1.35)
    random_resize_scale: Pair = (0.3, 1.0)
    """Area of the crop window as a share of the frame's."""
    reprob: float = Field(default=0.0, ge=0, le=1)
    """Probability of random erasing: a box of the clip is replaced by noise."""
    horizontal_flip: bool = True
    color_jitter: float = Field(default=0.0, ge=0)
    """Strength for brightness, contrast and saturation."""
    normalize_mean: Triple = (0.485, 0.456, 0.406)
    normalize_std: Triple = (0.229, 0.224, 0.225)
    """Of the colours in 0..1; applied on the device."""

    @model_validator(mode="after")
    def _ranges_in_order(self) -> "AugConfig":
        for name in ("random_resize_aspect_ratio", "random_resize_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} [{low}, {high}]: expected 0 < low <= high")
        if self.random_resize_scale[1] > 1:
            raise ValueError(f"random_resize_scale {list(self.random_resize_scale)}: a crop is at most the frame, 1.0")
        if min(self.normalize_std) <= 0:
            raise ValueError(f"normalize_std {list(self.normalize_std)}: must be above zero")
        return self


class VideoError(UserError):
    """A file that cannot be used as a clip; `filtered`: on the user's wish (too short, too long), not broken."""

    def __init__(self, path: str, reason: str, filtered: bool = False):
        super().__init__(path, reason, filtered)  # all as arguments, so that pickle can rebuild it
        self.path, self.reason, self.filtered = path, reason, filtered

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class Draw:
    """Sample `index` of the data set is number `slot` of the global batch of `step`, in pass `epoch` of its source."""

    step: int
    epoch: int
    index: int
    slot: int


@dataclass(frozen=True)
class BadFile:
    """A video that was not used, and why; `filtered` as in VideoError."""

    path: str
    reason: str
    filtered: bool = False


@dataclass(frozen=True)
class Sample:
    """The clips of one video.

    clips: uint8 [n, C, T, H, W], n = num_clips × views, segment-major; n = 0 when the sample is excluded.
    frames: int64 [num_clips, T], the source frames. label: -1 where the source has none.
    bad: videos that were met on the way to this sample and replaced (training), or why it is excluded (validation).
    """

    clips: torch.Tensor
    label: int
    index: int
    path: str
    frames: torch.Tensor
    bad: tuple[BadFile, ...] = ()

    @property
    def excluded(self) -> bool:
        return len(self.clips) == 0


@dataclass(frozen=True)
class Batch:
    """B samples with n clips each; row b·n + j of `clips` and of the masks is clip j of sample b.

    clips: uint8 [B·n, C, T, H, W]; labels, indices: int64 [B]; frames: int64 [B, num_clips, T].
    masks_context, masks_target: one int64 [B·n, K] for each mask of the configuration; empty without masks.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    paths: tuple[str, ...]
    frames: torch.Tensor
    step: int
    bad: tuple[BadFile, ...] = ()
    masks_context: tuple[torch.Tensor, ...] = ()
    masks_target: tuple[torch.Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def pin_memory(self) -> "Batch":
        return self._each_tensor(torch.Tensor.pin_memory)

    def to(self, device: torch.device | str) -> "Batch":
        """Copies to `device`; asynchronous where the memory is pinned."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def with_masks(self, context: Sequence[torch.Tensor], target: Sequence[torch.Tensor]) -> "Batch":
        return dataclasses.replace(self, masks_context=tuple(context), masks_target=tuple(target))

    def _each_tensor(self, function) -> "Batch":
        moved = {name: function(getattr(self, name)) for name in ("clips", "labels", "indices", "frames")}
        for name in ("masks_context", "masks_target"):
            moved[name] = tuple(function(mask) for mask in getattr(self, name))
        return dataclasses.replace(self, **moved)


def evenly_spaced(length: int, number: int) -> torch.Tensor:
    """At most `number` places of a set of `length` samples, from its first to its last, int64."""
    return torch.linspace(0, length - 1, min(number, length), dtype=torch.float64).long()


def to_float(
    clips: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 clips [..., C, T, H, W] to normalised `dtype`, on the device where they are: (clips / 255 - mean) / std."""
    x = clips.to(torch.float32, copy=True)  # written over: fresh memory costs more than the arithmetic
    for channel, m, s in zip(x.unbind(-4), mean, std, strict=True):
        # One pass with numbers as factor and summand; to broadcast them over the clip takes three times as long.
        torch.add(torch.tensor(-m / s), channel, alpha=1 / (255 * s), out=channel)
    return x.to(dtype)
