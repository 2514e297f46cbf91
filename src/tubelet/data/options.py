"""YAML sections `data` and `data_aug`."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, model_serializer, model_validator

from tubelet.config import RESUME_IGNORED, Config, ConfigError, Pair, Size, Triple, check_part
from tubelet.config.registry import Module, PartOptions
from tubelet.data.storage.options import StorageConfig
from tubelet.grid import ClipShape, SoundShape, nearest_multiple

SeekMode = Literal["exact", "approximate"]
MaskLengths = Literal["shared", "shortest"]
DECODERS = ("decord", "pyav", "torchcodec")

MaxBadFraction = Annotated[float, Field(ge=0, le=1)]
DataFormat = Annotated[PartOptions, Module("data", "FormatOptions", provides="Dataset", default="video_dataset")]
"""Type of an option that selects how samples are stored, by a module with `Dataset`: `{name: video_dataset}`."""


class Decoder(Config):
    """A library that decodes videos: its name, or a mapping `{name: torchcodec, seek_mode: approximate}`."""

    name: Literal["decord", "pyav", "torchcodec"] = "pyav"
    seek_mode: SeekMode = "exact"
    """Of torchcodec. `approximate` takes number and times of the frames from the header of the file, without reading
    the whole of it; frames of files whose rate is not constant are not those asked for."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Of torchcodec. `cuda` decodes on the GPU of the process; it needs `num_workers: 0`."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, raw: Any) -> Any:
        return {"name": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _of_torchcodec(self) -> "Decoder":
        for key, default in (("seek_mode", "exact"), ("device", "cpu")):
            if self.name != "torchcodec" and getattr(self, key) != default:
                raise ValueError(f"{key} {getattr(self, key)} is an option of torchcodec; set name to torchcodec")
        return self

    @model_serializer(mode="wrap")
    def _to_name(self, serialize: Callable[["Decoder"], dict[str, Any]]) -> Any:
        return self.name if self == Decoder(name=self.name) else serialize(self)

    def check_workers(self, num_workers: int) -> None:
        """Raise ValueError where worker processes cannot use the decoder."""
        if self.device != "cpu" and num_workers:
            raise ValueError(
                f"decoder.device {self.device} with num_workers {num_workers}: worker processes cannot use the GPU; "
                "set num_workers to 0, or device to cpu"
            )


class DataConfig(Config):
    """YAML section `data`. Keys have V-JEPA's names where they have the same meaning."""

    datasets: list[str] = Field(min_length=1)
    """Folders (searched recursively), lists (one `path label` per line), indexes (`.parquet`, see
    docs/your_own_data.md) or single video files; also remote ones, see docs/cluster_data.md."""
    datasets_weights: list[float] | None = None
    """Relative number of draws from each entry of `datasets`; None: every sample equally often, or, with
    `weight_by_duration`, every second of video."""
    weight_by_duration: bool = False
    """Draw each video in proportion to its duration; needs indexes in `datasets`."""
    format: DataFormat = Field({}, validate_default=True)
    """How the samples are stored: `{name: video_dataset}`, or another module of tubelet/data with `Dataset`."""

    batch_size: Annotated[int, RESUME_IGNORED] = Field(default=24, ge=1)
    """Samples per step and process."""
    mask_batch_size: int | None = Field(default=None, ge=1)
    """Samples whose masks are truncated to the shortest among them: a multiple of `batch_size`; None: the global batch.
    V-JEPA truncates per process; in a global batch of thousands the shortest mask leaves little context for all."""
    mask_lengths: MaskLengths = "shared"
    """How many tokens masks are truncated to. `shared`: what is expected of the shortest of `mask_batch_size` masks
    with blocks of the size of this step, rounded to a percent of the clip; up or down at random, so that the mean
    remains. All processes use the same block sizes and lengths, so that none waits for one with more tokens, and a run
    has about 20 different lengths, which matters to attention kernels that plan for each. `shortest`: the length of
    the shortest, as in V-JEPA; another one in nearly every step and process."""
    num_workers: Annotated[int, RESUME_IGNORED] = Field(default=2, ge=0)
    """Processes that read videos, for each process of the program; 0: read in the process itself."""
    pin_mem: Annotated[bool, RESUME_IGNORED] = True
    """Put batches into pinned memory, for faster copies to a GPU."""
    worker_timeout: Annotated[int, RESUME_IGNORED] = Field(default=300, ge=0)
    """Seconds to wait for a batch before the video that a worker hangs at counts as unreadable; 0: no limit. With
    `num_workers: 0` there is no limit either, and a decoder that hangs at a damaged file can only be killed."""

    clips_per_video: int = Field(default=1, ge=1)
    """Samples of each video in a pass over the data, each a clip of its own, at another position and in another batch;
    for few long videos. The clips of a video are those of as many passes with one clip each."""
    num_clips: int = Field(default=1, ge=1)
    """Clips per video, one from each of as many equal parts of it."""
    num_frames: int = Field(default=16, ge=1)
    """Frames of a clip."""
    tubelet_size: int = Field(default=2, ge=1)
    """Frames of a tubelet."""
    sampling_rate: int | None = Field(default=None, ge=1)
    """Take every n-th frame of the file. Alternatives: `fps` (frames per second) or `clip_duration` (seconds), which
    take the frames that are presented at these times, also where the rate of the file varies."""
    fps: float | None = Field(default=None, gt=0)
    """Frames of the clip per second; see `sampling_rate`."""
    clip_duration: float | None = Field(default=None, gt=0)
    """Seconds of a clip; see `sampling_rate`."""
    random_clip_sampling: bool = True
    """Random position of the clip in its part of the video; false: the middle."""
    allow_clip_overlap: bool = False
    """Where the parts are shorter than a clip, overlap the clips instead of repeating the last frame of each part."""
    filter_short_videos: bool = False
    """Skip videos shorter than one clip, with a warning, instead of repeating their last frame."""
    filter_long_videos: int = Field(default=10**9, ge=1)
    """Skip files larger than this, in bytes, with a warning."""

    crop_size: Size = 224
    """Pixels of the clips, one number or [height, width]."""
    patch_size: int = Field(default=16, ge=1)
    """Height and width of a patch in pixels."""

    decoder: Decoder = Decoder()
    max_bad_fraction: Annotated[MaxBadFraction, RESUME_IGNORED] = 0.05
    """Training stops when more than this fraction of the videos drawn so far are unreadable; 1: never."""
    cache: Annotated[str | None, RESUME_IGNORED] = None
    """Folder for decoded videos (uint8) and sound, shared by workers and runs; for small data sets of short videos."""
    storage: Annotated[StorageConfig, RESUME_IGNORED] = StorageConfig()
    """How remote files are read."""

    @model_validator(mode="after")
    def _fits_together(self) -> "DataConfig":
        weights = self.datasets_weights
        if weights is not None and len(weights) != len(self.datasets):
            raise ValueError(
                f"datasets_weights has {len(weights)} entries for {len(self.datasets)} datasets; give one for each"
            )
        if weights is not None and (min(weights) < 0 or sum(weights) <= 0):
            raise ValueError(f"datasets_weights {weights}: weights must not be negative, and one must be positive")
        given = [name for name in ("sampling_rate", "fps", "clip_duration") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} given; keep exactly one of sampling_rate, fps, clip_duration")
        if not given and self.num_frames > 1:
            raise ValueError("no frame rate for the clips: give one of sampling_rate, fps, clip_duration")
        _ = self.clip_shape.grid  # checks the sizes
        self.decoder.check_workers(self.num_workers)
        if self.mask_batch_size is not None and self.mask_batch_size % self.batch_size:
            raise ValueError(
                f"mask_batch_size {self.mask_batch_size} is not a multiple of batch_size {self.batch_size}; "
                f"{nearest_multiple(self.mask_batch_size, self.batch_size)} is"
            )
        return self

    @property
    def clip_shape(self) -> ClipShape:
        """Size of the clips and tubelets."""
        return ClipShape(self.num_frames, self.crop_size, self.patch_size, self.tubelet_size)

    @property
    def sound_shape(self) -> SoundShape | None:
        """Size of the sound of a clip; None where the format does not read it."""
        sound_of_clip = getattr(self.format, "sound_of_clip", None)
        return None if sound_of_clip is None else sound_of_clip(self)


NORMALIZATION = ("normalize_mean", "normalize_std")


class AugConfig(Config):
    """YAML section `data_aug`: augmentations, the same for all frames of a clip except with `motion_shift`."""

    auto_augment: bool = False
    """RandAugment of torchvision."""
    auto_augment_ops: int = Field(default=4, ge=1)
    """Operations of RandAugment."""
    auto_augment_magnitude: int = Field(default=7, ge=0, le=30)
    """Magnitude of RandAugment's operations."""
    motion_shift: bool = False
    """Move the crop window from one random window to another during the clip."""
    random_resize_aspect_ratio: Pair = (0.75, 1.35)
    """Range of the width of the crop window divided by its height."""
    random_resize_scale: Pair = (0.3, 1.0)
    """Area of the crop window as a fraction of the frame's."""
    reprob: float = Field(default=0.0, ge=0, le=1)
    """Probability of random erasing, which replaces a box of the clip by noise."""
    horizontal_flip: bool = True
    """Mirror half of the clips."""
    vertical_flip: bool = False
    """Turn half of the clips upside down: for videos from above, which have no preferred direction."""
    rotate90: bool = False
    """Rotate clips by 0, 90, 180 or 270 degrees, equally often; needs a square `crop_size`."""
    color_jitter: float = Field(default=0.0, ge=0)
    """Strength for brightness, contrast and saturation."""
    normalize_mean: Triple = (0.485, 0.456, 0.406)
    """Mean of each color channel; see `normalize_std`."""
    normalize_std: Triple = (0.229, 0.224, 0.225)
    """For colors from 0 to 1; applied on the device."""

    @model_validator(mode="after")
    def _ranges_in_order(self) -> "AugConfig":
        for name in ("random_resize_aspect_ratio", "random_resize_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} [{low}, {high}]: expected 0 < low <= high")
        if self.random_resize_scale[1] > 1:
            raise ValueError(
                f"random_resize_scale {list(self.random_resize_scale)}: a crop is at most the whole frame, 1.0"
            )
        if min(self.normalize_std) <= 0:
            raise ValueError(f"normalize_std {list(self.normalize_std)}: must be positive")
        return self


class ViewOptions(Config):
    """A view of each clip in multi-crop training: a value of the mapping `views` of an objective."""

    count: int = Field(1, ge=0)
    """Crops of each clip; 0 leaves the view out."""
    crop_size: Size | None = None
    """Pixels of the crops; null: `data.crop_size`."""
    num_frames: int | None = Field(None, ge=1)
    """Frames of each crop: a random window of the clip's frames, so that crops are near in time, not simultaneous;
    null: all frames. Encoders without rotary positions stretch the times of a shorter clip to those of a full one."""
    data_aug: dict[str, Any] = {}
    """What differs from section `data_aug` for this view."""

    def clip_shape(self, clip: ClipShape) -> ClipShape:
        """Return the size of a crop of a clip. Raises ValueError where it has more frames than the clip."""
        num_frames = self.num_frames or clip.num_frames
        if num_frames > clip.num_frames:
            raise ValueError(f"num_frames {num_frames} exceeds the {clip.num_frames} frames of a clip")
        return dataclasses.replace(clip, num_frames=num_frames, crop_size=self.crop_size or clip.crop_size)

    def augmentation(self, common: AugConfig, at: str) -> AugConfig:
        """Return section `data_aug` with the changes of this view.

        Args:
            common: Section `data_aug`.
            at: Path of the view's options, for messages.

        Raises:
            ConfigError: A change is invalid.
        """
        for name in NORMALIZATION:
            if name in self.data_aug:
                raise ConfigError(f"  {at}.data_aug.{name}: all views are normalized alike; set data_aug.{name}")
        return check_part({**common.model_dump(), **self.data_aug}, AugConfig, f"{at}.data_aug")
