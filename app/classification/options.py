"""Options of supervised training and fine-tuning. Data, head and results are those of a probe."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, Config
from tubelet.models import EncoderOptions
from tubelet.models.inflatable import TubeletInit
from tubelet.probing import fine_tuning
from tubelet.probing.data_options import EvaluationConfig, LabelledDataConfig, check_one_normalization
from tubelet.probing.heads import TrainedHeadOptions
from tubelet.probing.options import PretrainConfig
from tubelet.training.options import LoggingConfig
from tubelet.training.schedules import NotNegative, Positive


class DataConfig(LabelledDataConfig, fine_tuning.DataConfig):
    """YAML section `data`."""


class ImageViTConfig(Config):
    """YAML section `image_vit`: an image ViT of timm whose weights the encoder starts from ("inflation")."""

    weights: str
    """File of timm's own weights (.safetensors, .pth)."""
    timm_name: str = "vit_base_patch16_224"
    """Name of the model in timm."""
    tubelet_init: TubeletInit = "central_frame"
    """How the patch embedding of one frame becomes that of a tubelet."""


class OptimizationConfig(fine_tuning.OptimizationConfig):
    """YAML section `optimization`."""

    attend_across_segments: bool = True
    """Make one prediction from the tokens of all segments; false: one each, averaged."""
    num_epochs: int = Field(50, ge=1)
    """Passes over the training videos."""
    batch_size: Annotated[int, RESUME_IGNORED] = Field(16, ge=1)
    """Videos of a step in one process; their number in all processes may not change when a run is resumed."""
    lr: Positive = 1e-3
    warmup: NotNegative = 5.0
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Of the cross-entropy."""
    mixup: float = Field(0.0, ge=0)
    """Parameter of MixUp's beta distribution; 0 for none. With `cutmix`, one of the two at random for each pair."""
    cutmix: float = Field(0.0, ge=0)
    """Parameter of CutMix's beta distribution; 0 for none."""

    @model_validator(mode="after")
    def _check_pairs(self) -> "OptimizationConfig":
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size: mixup and cutmix mix pairs, {self.batch_size} is odd; take an even number")
        return self

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class Options(fine_tuning.FineTuningOptions):
    """A supervised run. The weights of the last epoch are evaluated: validation selects nothing."""

    app: Literal["classification"] = "classification"
    data: DataConfig
    """Labelled videos or images for training and validation."""
    encoder: EncoderOptions | None = None
    """Encoder that is trained from scratch, or from `image_vit`; null: the one that `pretrain` names. One of the two
    has to be given."""
    image_vit: ImageViTConfig | None = None
    pretrain: PretrainConfig | None = None
    """Encoder that is fine-tuned: that of a run, or released weights, as for a probe."""
    head: TrainedHeadOptions = Field({}, validate_default=True)
    """What classifies the tokens of the encoder: a head of tubelet/probing/heads that is trained."""
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: Annotated[LoggingConfig, RESUME_IGNORED] = LoggingConfig(keep_checkpoints=1)
    """`monitor_every`, `monitor_clips`: how often the accuracy on how many validation videos is logged."""

    @model_validator(mode="after")
    def _check_parts(self) -> "Options":
        if self.pretrain is not None and (self.encoder is not None or self.image_vit is not None):
            raise ValueError(
                "pretrain: the architecture of a pretrained encoder is that of its run; remove `encoder` and "
                "`image_vit`, and put options that shall differ into pretrain.encoder"
            )
        if self.image_vit is not None and self.encoder is None:
            raise ValueError("image_vit: give the `encoder` that starts from its weights, such as timesformer_base")
        self.check_encoder()
        check_one_normalization(self.data, self.data_aug)
        self.evaluation.check(self.data)
        if self.distributed.kind != "ddp":
            raise ValueError(f"distributed: {self.distributed.kind} is not supported for supervised training; take ddp")
        return self
