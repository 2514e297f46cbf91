"""Options of supervised training and fine-tuning: the YAML's sections. Data, head and results are those of a probe."""

from typing import Literal

import torch
from pydantic import Field, model_validator

from tubelet.config import Config, Pair
from tubelet.data import AugConfig
from tubelet.models import ModelConfig, check_returns_tokens
from tubelet.models.inflatable import TubeletInit
from tubelet.probing.options import (
    ClassifierConfig,
    LabelledDataConfig,
    PretrainConfig,
    check_one_normalization,
)
from tubelet.runtime.parallelize import DistributedConfig
from tubelet.training.bookkeeping import LoggingConfig
from tubelet.training.schedules import NotNegative, Positive, RateConfig


class DataConfig(LabelledDataConfig):
    patch_size: int | None = Field(None, ge=1)
    """Of a `model`, by default 16; a pretrained one has its own."""
    tubelet_size: int | None = Field(None, ge=1)
    """By default 2."""


class ImageViTConfig(Config):
    """YAML section `image_vit`: an image ViT of timm whose weights the encoder starts from ("inflation")."""

    weights: str
    """A file of timm's own weights (.safetensors, .pth)."""
    timm_name: str = "vit_base_patch16_224"
    tubelet_init: TubeletInit = "central_frame"


class OptimizationConfig(RateConfig):
    """YAML section `optimization`."""

    attend_across_segments: bool = True
    """One prediction from the tokens of all segments; false: one each, averaged."""
    num_epochs: int = Field(50, ge=1)
    resolution: int = Field(224, ge=1)
    batch_size: int = Field(16, ge=1)
    """Videos of a step in one process."""
    accumulation_steps: int = Field(1, ge=1)
    """Parts that each process's batch is run in, one after another, before the optimiser's step."""
    lr: Positive = 1e-3
    start_lr: NotNegative = 1e-6
    final_lr: NotNegative = 1e-6
    warmup: NotNegative = 5.0
    weight_decay: NotNegative = 0.05
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Each block of the encoder learns at this share of the rate of the one above it; see `optim.layer_decay`."""
    betas: Pair = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    clip_grad: float | None = Field(1.0, gt=0)
    """Largest gradient norm."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    mixup: float = Field(0.0, ge=0)
    """The parameter of MixUp's beta distribution; 0: none. With `cutmix`, one of the two at random for each pair."""
    cutmix: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> "OptimizationConfig":
        self.check_warmup(self.num_epochs)
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps: {self.accumulation_steps} does not divide batch_size {self.batch_size}"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size: mixup and cutmix mix pairs, {self.batch_size} is odd; take an even number")
        return self

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class MetaConfig(Config):
    """YAML section `meta`."""

    seed: int = Field(0, ge=0)
    """Of the weights, the few-shot subset, the order of batches and the augmentation."""
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"
    compile: bool = False
    """torch.compile the encoder."""


class Options(Config):
    """A supervised run. The last epoch counts: validation chooses nothing."""

    app: Literal["classification"] = "classification"
    folder: str
    data: DataConfig
    data_aug: AugConfig | None = None
    model: ModelConfig | None = None
    """The encoder that is trained from scratch, or from `image_vit`; null: a ViT-B, or what `pretrain` names."""
    image_vit: ImageViTConfig | None = None
    pretrain: PretrainConfig | None = None
    """The encoder that is fine-tuned: a run's, or released weights, as for a probe."""
    head: Literal["attentive", "linear"] = "attentive"
    """linear: reads the mean token."""
    classifier: ClassifierConfig = ClassifierConfig()
    """Of the attentive head."""
    optimization: OptimizationConfig = OptimizationConfig()
    distributed: DistributedConfig = DistributedConfig()
    meta: MetaConfig = MetaConfig()
    logging: LoggingConfig = LoggingConfig(keep_checkpoints=1)
    """`monitor_every`, `monitor_clips`: how often the accuracy on how many validation videos is put into the log."""

    @model_validator(mode="after")
    def _one_start(self) -> "Options":
        if self.pretrain is not None and (self.model is not None or self.image_vit is not None):
            raise ValueError(
                "pretrain: a pretrained encoder is what its run says; remove `model` and `image_vit`, and write what "
                "shall differ into `pretrain`, e.g. pretrain.encoder_args"
            )
        if self.pretrain is not None and (self.data.patch_size, self.data.tubelet_size) != (None, None):
            raise ValueError("data.patch_size, data.tubelet_size: the pretrained encoder has its own; remove them")
        if self.model is not None:
            check_returns_tokens(self.model.encoder_args, "model.encoder_args")
        check_one_normalization(self.data, self.data_aug)
        if self.distributed.kind != "ddp":
            raise ValueError(f"distributed: {self.distributed.kind}: whole models are trained here; take ddp")
        return self

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.meta.dtype)
