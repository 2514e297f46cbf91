"""Options of the extraction of features, and of the programs that read them."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, Config, Square
from tubelet.probing.data_options import ClipsConfig
from tubelet.probing.options import PretrainConfig
from tubelet.runtime.parallelize import DistributedConfig

Kind = Literal["mean", "slots", "tokens"]


class FeaturesDataConfig(ClipsConfig):
    """YAML section `data`: videos, and which clips of them are encoded."""

    datasets: list[str] = Field(min_length=1)
    """Folders (searched recursively), lists (one `path label` per line, the label is optional) or single files."""
    num_segments: int | None = Field(None, ge=1)
    """Number of clips of a video, one from the middle of each of as many equal parts of it, as in a probe; null:
    sliding windows that cover the whole video."""
    overlap: int = Field(0, ge=0)
    """Frames of a sliding window that the next one has, too: a window starts `frames_per_clip - overlap` of its own
    frames after the one before it. The last window is aligned to the end of the video."""
    resolution: Square = 224
    """Height and width of the clips: the center crop of the video, resized."""

    @model_validator(mode="after")
    def _overlap_of_windows(self) -> "FeaturesDataConfig":
        if self.overlap >= self.frames_per_clip:
            raise ValueError(f"overlap {self.overlap}: it must be less than frames_per_clip {self.frames_per_clip}")
        if self.overlap and self.num_segments is not None:
            raise ValueError("overlap is for sliding windows; remove it, or set num_segments: null")
        return self


class ShardConfig(Config):
    """YAML section `shard`: the share of one of several jobs, each with its own folder."""

    index: int = Field(0, ge=0)
    """This job, from 0."""
    count: int = Field(1, ge=1)
    """Number of jobs."""

    @model_validator(mode="after")
    def _in_range(self) -> "ShardConfig":
        if self.index >= self.count:
            raise ValueError(f"index {self.index}: with count {self.count}, it is 0 to {self.count - 1}")
        return self


class FeaturesOptions(Config):
    """Which features of which clips under which encoder."""

    eval_name: str
    folder: Annotated[str, RESUME_IGNORED]
    """Folder of the stored features."""
    pretrain: PretrainConfig
    data: FeaturesDataConfig
    features: list[Kind] = Field(["mean"], min_length=1)
    """What is kept of a clip: the mean of all tokens, the mean of the tokens of each time slot, or all tokens."""
    dtype: Literal["float16", "float32"] = "float32"
    """Type of the features on disk."""
    batch_size: int = Field(16, ge=1)
    """Clips of a forward pass, also of several videos."""
    use_bfloat16: bool = False
    """Compute the encoder in bfloat16."""
    videos_per_part: int = Field(64, ge=1)
    """Videos of a part. A killed process loses at most the part that it works on, and holds its features in memory;
    with `tokens` or long videos, use fewer."""
    shard: ShardConfig = ShardConfig()
    distributed: Annotated[DistributedConfig, RESUME_IGNORED] = DistributedConfig()

    @model_validator(mode="after")
    def _check_features(self) -> "FeaturesOptions":
        if len(set(self.features)) < len(self.features):
            raise ValueError(f"features {self.features}: name each once")
        if self.distributed.kind != "ddp":
            raise ValueError(f"distributed: {self.distributed.kind}: the encoder is not sharded; remove it")
        return self


class ItemsConfig(Config):
    """A program that reads stored features: its folder, and how vectors are made from them."""

    folder: str
    """Folder of the results."""
    features: str
    """Folder of `evals.features`, or one whose subfolders are those of its shards."""
    kind: Literal["mean", "slots"] = "mean"
    """Which of the stored features; `slots` are concatenated."""
    unit: Literal["video", "clip"] = "video"
    """Whether a vector is a video, the mean over its clips, or a clip."""
    distributed: Annotated[DistributedConfig, RESUME_IGNORED] = DistributedConfig()
