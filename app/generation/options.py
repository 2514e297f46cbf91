"""Options of future-frame prediction: the YAML's sections."""

from typing import Literal

import torch
from pydantic import Field, model_validator

from tubelet.config import Config, check_part
from tubelet.config.registry import name_of
from tubelet.data import AugConfig, Decoder
from tubelet.data import DataConfig as ClipsConfig
from tubelet.generation.feature_decoder import DecoderConfig, PretrainConfig
from tubelet.models import ModelConfig
from tubelet.runtime.parallelize import DistributedConfig
from tubelet.training.bookkeeping import LoggingConfig
from tubelet.training.schedules import NotNegative, Positive, RateConfig


class DataConfig(Config):
    """YAML section `data`: clips of `num_frames` frames seen and the frames that follow them."""

    dataset_type: name_of("data", "Dataset") = "VideoDataset"
    """`VideoDataset` for folders and lists of video files, `moving_mnist`, `kth`."""
    train: list[str] = Field(min_length=1)
    test: list[str] = Field(min_length=1)
    num_frames: int = Field(10, ge=2)
    """Frames seen."""
    num_target_frames: int = Field(10, ge=1)
    """Frames predicted at once, and in training."""
    frame_step: int = Field(1, ge=1)
    """Take every n-th frame of the file."""
    channels: Literal[1, 3] = 3
    """1: grey."""
    crop_size: int = Field(64, ge=1)
    patch_size: int = Field(8, ge=1)
    tubelet_size: int = Field(1, ge=1)
    normalize_mean: float = 0.5
    normalize_std: float = Field(0.25, gt=0)
    """Of the frames seen, from 0 to 1, before they enter the model; a pretrained one has its own."""

    batch_size: int = Field(16, ge=1)
    """Clips of a step in one process."""
    num_workers: int = Field(2, ge=0)
    pin_mem: bool = True
    worker_timeout: int = Field(300, ge=0)
    """Seconds without a batch from a worker before the video it is stuck at counts as bad; 0: wait for ever."""
    decoder: Decoder = "pyav"
    max_bad_share: float = Field(0.05, ge=0, le=1)
    """Training stops when more than this share of the draws met an unreadable video."""
    cache: str | None = None
    """Folder for decoded videos (uint8), shared by workers and runs; for small sets of short videos."""

    def clips(self, entries: list[str], num_frames: int, *, at_random: bool) -> ClipsConfig:
        """What a data set is told: clips of `num_frames` frames in all; videos that are shorter are left out."""
        raw = {
            "datasets": entries,
            "dataset_type": self.dataset_type,
            "num_frames": num_frames,
            "sampling_rate": self.frame_step,
            "random_clip_sampling": at_random,
            "filter_short_videos": True,
            "crop_size": self.crop_size,
            "patch_size": 1,  # whether the clip can be cut into patches is asked of the model itself
            "tubelet_size": 1,
            "decoder": self.decoder,
            "cache": self.cache,
        }
        return check_part(raw, ClipsConfig, "data")

    def sizes(self) -> dict[str, int]:
        """What makes the token grid of the frames seen."""
        return {name: getattr(self, name) for name in ("crop_size", "num_frames", "patch_size", "tubelet_size")}


class OptimizationConfig(RateConfig):
    """YAML section `optimization`."""

    steps: int = Field(10_000, ge=1)
    loss: Literal["l1", "l2"] = "l2"
    """l2 predicts the mean of all that may come, l1 the median, which is sharper and darker."""
    warmup: NotNegative = 500
    """Steps of linear warm-up of the learning rate."""
    start_lr: NotNegative = 0.0
    lr: Positive = 1e-3
    final_lr: NotNegative = 1e-6
    weight_decay: NotNegative = 0.05
    clip_grad: float = Field(1.0, gt=0)
    betas: tuple[float, float] = Field((0.9, 0.999), strict=False)

    @model_validator(mode="after")
    def _warms_up_within(self) -> "OptimizationConfig":
        self.check_warmup(self.steps, "steps")
        return self


class EvaluationConfig(Config):
    """YAML section `evaluation`: what is measured and drawn after training. It may be changed and asked for again."""

    num_frames: int | None = Field(None, ge=1)
    """Frames to predict; beyond `data.num_target_frames` the model goes on from its own frames."""
    num_clips: int | None = Field(None, ge=1)
    """Test clips, evenly over the set; null: all."""
    pictures: int = Field(4, ge=1)
    """Clips shown in prediction.png and prediction.gif."""
    draws: int = Field(4, ge=1)
    """Answers shown side by side where the model has several: a V-JEPA whose predictor noises its targets."""
    fps: float = Field(5.0, gt=0)
    """Of the GIF."""


class MetaConfig(Config):
    """YAML section `meta`."""

    seed: int = Field(0, ge=0)
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    compile: bool = False
    """torch.compile what is trained."""


class Options(Config):
    """Future-frame prediction, by a `model` that is trained for it or by a V-JEPA that was pretrained before."""

    app: Literal["generation"] = "generation"
    folder: str
    data: DataConfig
    data_aug: AugConfig | None = None
    """Augmentation of the training clips; null: the middle of the frame."""
    model: ModelConfig | None = None
    pretrain: PretrainConfig | None = None
    decoder: DecoderConfig = DecoderConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    distributed: DistributedConfig = DistributedConfig()
    meta: MetaConfig = MetaConfig()
    logging: LoggingConfig = LoggingConfig()
    """`monitor_every`, `monitor_clips`: how often the error on how many test clips is put into the log."""

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Options":
        if (self.model is None) == (self.pretrain is None):
            raise ValueError(
                "give either `model`, which is trained to predict frames, or `pretrain`, a run of app.vjepa"
            )
        if self.pretrain is not None and self.data.channels != 3:
            raise ValueError(f"data.channels: {self.data.channels}, but pretraining sees colours; set it to 3")
        if self.distributed.kind != "ddp":
            raise ValueError("distributed: frames are predicted by whole models; take ddp")
        return self

    def frames_ahead(self) -> int:
        """Frames that are predicted in the evaluation."""
        return self.evaluation.num_frames or self.data.num_target_frames

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.meta.dtype)
