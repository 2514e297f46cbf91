"""Options of the clips that a frozen encoder reads, and of labelled ones. Keys that V-JEPA has, too, have its names."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, RESUME_NULL_MATCHES, Config, Triple
from tubelet.data import NORMALIZATION, AugConfig, DataFormat, Decoder
from tubelet.probing.label_subset import LabelSubset

FRAME_RATES = ("frame_step", "fps", "clip_duration")


class ClipsConfig(Config):
    """How the clips of videos (or images) are made for a frozen encoder."""

    format: DataFormat = Field({}, validate_default=True)
    frames_per_clip: int = Field(16, ge=1)
    """Frames of a clip."""
    frame_step: int | None = Field(None, ge=1)
    """Take every n-th frame of the file. Alternatives: `fps` (frames of the clip per second) and `clip_duration`
    (seconds). The default is every 4th frame."""
    fps: float | None = Field(None, gt=0)
    """Frames of the clip per second; see `frame_step`."""
    clip_duration: float | None = Field(None, gt=0)
    """Seconds of a clip; see `frame_step`."""
    decoder: Decoder = Decoder()
    num_workers: Annotated[int, RESUME_IGNORED] = Field(2, ge=0)
    """Processes that read videos, for each process of the program; 0: read in the process itself."""
    worker_timeout: Annotated[int, RESUME_IGNORED] = Field(300, ge=0)
    """Seconds without a batch from a worker before the video that it is reading counts as unreadable; 0: no limit."""
    cache: Annotated[str | None, RESUME_IGNORED] = None
    """Folder for decoded videos and sound, shared by workers and runs, for small sets of short videos."""
    normalize_mean: Annotated[Triple | None, RESUME_NULL_MATCHES] = None
    """Mean of the colors in 0..1; see `normalize_std`."""
    normalize_std: Annotated[Triple | None, RESUME_NULL_MATCHES] = None
    """Mean and standard deviation of the colors in 0..1. By default those of the pretraining where its file says them,
    otherwise ImageNet's."""

    def normalization(self) -> dict[str, tuple[float, float, float] | None]:
        return {name: getattr(self, name) for name in NORMALIZATION}

    @model_validator(mode="before")
    @classmethod
    def _every_fourth_frame(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and all(raw.get(name) is None for name in FRAME_RATES):
            return raw | {"frame_step": 4}
        return raw

    @model_validator(mode="after")
    def _one_frame_rate(self) -> "ClipsConfig":
        given = [name for name in FRAME_RATES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} given; keep one of {', '.join(FRAME_RATES)}, the others null")
        return self


class LabelledDataConfig(ClipsConfig, LabelSubset):
    """YAML section `data`: labelled videos (or images) for training and validation."""

    dataset_train: str
    """List with a line `path label` for each video; for `image_dataset`, a folder with a subfolder for each class."""
    dataset_val: str
    """The same for validation."""
    num_classes: int = Field(ge=2)
    """Number of classes; labels are 0 to num_classes - 1."""
    num_segments: int = Field(1, ge=1)
    """Number of clips of a video, one from each of as many equal parts of it."""
    num_views_per_segment: int = Field(1, ge=1)
    """Spatial crops of a clip in validation; training uses one."""
    on_bad_video: Literal["raise", "exclude"] = "raise"
    """Whether a file that cannot be read is an error, or excluded and listed in results.json."""


class EvaluationConfig(Config):
    """YAML section `evaluation`: further measurements of the head that is selected."""

    shuffle_frames: bool = False
    """Also classify the validation clips with the frames of each in random order: `shuffled_top1` in results.json. As
    much as it is below `top1` is due to the order of the frames."""

    def check(self, data: LabelledDataConfig) -> None:
        """Raise ValueError where the clips are images."""
        if self.shuffle_frames and (data.frames_per_clip == 1 or data.format.name == "image_dataset"):
            raise ValueError("evaluation.shuffle_frames: an image has no order of frames; remove it")


def check_one_normalization(data: LabelledDataConfig, augmentation: AugConfig | None) -> None:
    """Raises ValueError where `data_aug` gives another normalization than `data`."""
    for name in NORMALIZATION if augmentation is not None else ():
        if getattr(augmentation, name) not in (getattr(data, name), getattr(AugConfig(), name)):
            raise ValueError(f"data_aug.{name}: clips are normalized by data.{name}; set that, and remove this key")


class ProbeDataConfig(LabelledDataConfig):
    """YAML section `data` of a probe, whose features can be stored."""

    # Features from the cache are the same but for rounding, wherever it is.
    cache_features: Annotated[bool | str, RESUME_IGNORED] = False
    """Extract the features once, without augmentation, into `<folder>/features` (true) or the given folder. They are
    identified by encoder, video and clip options, not by label: tasks on the same videos share them."""
    feature_memory: Annotated[float, RESUME_IGNORED] = Field(0.5, ge=0, le=1)
    """Fraction of the available host memory that extracted features may take. Where they do not fit, they are read from
    disk for each batch; the results are the same."""
