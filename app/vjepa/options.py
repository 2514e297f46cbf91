"""Options of self-supervised pretraining: the YAML's sections, with V-JEPA's names where the meaning is the same."""

from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from tubelet.config import Config, ConfigError, Pair, check_part
from tubelet.config.registry import find
from tubelet.data import AugConfig, DataConfig
from tubelet.models import ModelConfig, build_encoder, build_predictor, check_returns_tokens
from tubelet.models.jepa import LossConfig
from tubelet.runtime.parallelize import DistributedConfig
from tubelet.training import schedules
from tubelet.training.bookkeeping import LoggingConfig
from tubelet.training.schedules import NotNegative, Positive, RateConfig


class OptimizationConfig(RateConfig):
    """YAML section `optimization`."""

    epochs: int = Field(300, ge=1)
    ipe: int | None = Field(None, ge=1)
    """Iterations (steps) an epoch; by default as many as see each clip once."""
    ipe_scale: float = Field(1.25, ge=1)
    """Schedules are stretched by this factor, so that training ends before they do."""
    lr: Positive = 6.25e-4
    start_lr: NotNegative = 2e-4
    final_lr: NotNegative = 1e-6
    warmup: NotNegative = 40
    weight_decay: NotNegative = 0.04
    final_weight_decay: NotNegative = 0.4
    ema: Pair = (0.998, 1.0)
    """Momentum of the target encoder at the first step and at the schedule's end."""
    clip_grad: float | None = Field(10.0, gt=0)
    """Largest gradient norm, applied after the warm-up."""
    betas: Pair = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    accumulation_steps: int = Field(1, ge=1)
    """Parts that each process's batch is run in, one after another, before the optimiser's step."""

    @model_validator(mode="after")
    def _momentum_is_a_share(self) -> "OptimizationConfig":
        if not all(0 <= momentum <= 1 for momentum in self.ema):
            raise ValueError(f"ema: momentum lies between 0 and 1, got {list(self.ema)}")
        self.check_warmup(self.epochs)
        return self


class Schedule:
    """What `optimization` sets for each step, as pure functions of the step."""

    def __init__(self, options: OptimizationConfig, steps_per_epoch: int):
        self.options = options
        self.steps_per_epoch = options.ipe or steps_per_epoch
        self.steps = options.epochs * self.steps_per_epoch
        self.stretched = self.steps * options.ipe_scale

    def lr(self, step: int) -> float:
        return self.options.learning_rate(step, self.steps_per_epoch, self.stretched)

    def weight_decay(self, step: int) -> float:
        return schedules.cosine(step, self.stretched, self.options.weight_decay, self.options.final_weight_decay)

    def momentum(self, step: int) -> float:
        return schedules.linear(step, self.stretched, *self.options.ema)

    def clip_grad(self, step: int) -> float:
        """The largest gradient norm; infinite where gradients are not clipped."""
        limit = self.options.clip_grad
        warm = step >= self.options.warmup * self.steps_per_epoch
        return limit if limit is not None and warm else float("inf")


class MetaConfig(Config):
    """YAML section `meta`."""

    seed: int = Field(0, ge=0)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    compile: bool = False
    """torch.compile the encoders and the predictor."""
    load_checkpoint: bool = True
    """Continue the run that the folder holds; false refuses a folder that holds one."""


class Options(Config):
    """A pretraining run."""

    app: Literal["vjepa"] = "vjepa"
    folder: str
    init_from: str | None = None
    """Run folder or checkpoint whose weights a new run starts from (continued pretraining)."""
    data: DataConfig
    data_aug: AugConfig = AugConfig()
    mask: list[dict] = Field(min_length=1)
    """One entry a mask; each is checked by the `MaskConfig` of the file that `data.mask_type` names."""
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    distributed: DistributedConfig = DistributedConfig()
    meta: MetaConfig = MetaConfig()
    logging: LoggingConfig = LoggingConfig()

    @field_validator("mask")
    @classmethod
    def _masks_of_their_type(cls, masks: list[dict], info: ValidationInfo) -> list[dict]:
        if "data" not in info.data:  # `data` has errors of its own
            return masks
        schema = find("masks", info.data["data"].mask_type).MaskConfig
        return [check_part(mask, schema, f"mask.{i}").model_dump(mode="json") for i, mask in enumerate(masks)]

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Options":
        data = self.data
        if data.batch_size % self.optimization.accumulation_steps:
            raise ValueError(
                f"optimization.accumulation_steps: {self.optimization.accumulation_steps} does not divide "
                f"data.batch_size {data.batch_size}"
            )
        if self.loss.inv_coeff > 0 and len(self.mask) < 2:
            raise ValueError("loss.inv_coeff compares a clip's features under two masks; give `mask` a second entry")
        check_returns_tokens(self.model.encoder_args, "model.encoder_args")
        self.mask_collator()
        with torch.device("meta"):
            encoder = build_encoder(self.model, **self.grid())
            if not encoder.accepts_masks:
                raise ValueError(
                    f"model.encoder: {self.model.model_name} of {self.model.encoder} needs all tokens and cannot see a "
                    "part of the video"
                )
            try:
                build_predictor(self.model, encoder, **self.grid(), num_mask_tokens=len(self.mask))
            except ValueError as error:
                raise ValueError(f"model: the predictor cannot be built: {error}") from None
        return self

    def check_clip_size(self, processes: int) -> None:
        """Raises ConfigError where so many processes see too few clips at once for the loss or for the masks."""
        clips = self.data.batch_size * self.data.num_clips // self.optimization.accumulation_steps * processes
        if clips < 2 and (self.loss.std_coeff or self.loss.cov_coeff):
            raise ConfigError(
                "loss.std_coeff and loss.cov_coeff compare clips that are run together, and that is one: raise "
                "data.batch_size, or lower optimization.accumulation_steps"
            )
        together, batch = self.data.mask_batch_size, self.data.batch_size * processes
        if together is not None and batch % together:
            raise ConfigError(
                f"data.mask_batch_size: {together} does not divide the {batch} samples of {processes} process(es) with "
                f"data.batch_size {self.data.batch_size}; take a multiple of {self.data.batch_size} that does, or null"
            )

    def mask_collator(self):
        """The collator of `data.mask_type`; an impossible mask is an error here, before any data is read."""
        return find("masks", self.data.mask_type).MaskCollator(cfgs_mask=self.mask, **self.grid())

    def grid(self) -> dict[str, int]:
        """What makes the token grid: crop_size, num_frames, patch_size, tubelet_size."""
        data = self.data
        return {name: getattr(data, name) for name in ("crop_size", "num_frames", "patch_size", "tubelet_size")}

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.meta.dtype)
