"""What programs have in common that train a task on an encoder, which is new or pretrained, frozen or trained along."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, ConfigError
from tubelet.data import AugConfig
from tubelet.data.bad_files import BadFiles
from tubelet.data.loader import SampleSource, make_train_loader
from tubelet.data.streams import SampleStream
from tubelet.grid import ClipShape
from tubelet.models import EncoderOptions, build_encoder, check_returns_tokens
from tubelet.models.interfaces import Encoder
from tubelet.probing.encoder import load
from tubelet.probing.options import ClipsConfig, PretrainConfig
from tubelet.runtime.distributed import World
from tubelet.training import options as training
from tubelet.training import schedules
from tubelet.training.callbacks import BadFileCheck
from tubelet.training.objective import Objective
from tubelet.training.options import TrainingOptions
from tubelet.training.schedules import NotNegative, Positive, Schedule
from tubelet.training.trainer import Stateful, Trainer


class DataConfig(ClipsConfig):
    """YAML section `data`."""

    patch_size: int | None = Field(None, ge=1)
    """Patch size of an encoder from scratch, by default 16; a pretrained encoder has its own."""
    tubelet_size: int | None = Field(None, ge=1)
    """Frames of a tubelet of an encoder from scratch, by default 2."""


class OptimizationConfig(schedules.OptimizationConfig):
    """YAML section `optimization`."""

    resolution: int = Field(224, ge=1)
    """Height and width of the clips in pixels."""
    num_epochs: int = Field(ge=1)
    """Passes over the training samples."""
    batch_size: Annotated[int, RESUME_IGNORED] = Field(32, ge=1)
    """Samples of a step in one process; their number in all processes may not change when a run is resumed."""
    lr: Positive = 5e-4
    start_lr: NotNegative = 1e-6
    final_lr: NotNegative = 1e-6
    weight_decay: NotNegative = 0.05
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Factor on the learning rate from each block of the encoder to the one below it; see `optimizer.layer_decay`."""
    clip_grad: float | None = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "OptimizationConfig":
        self.check_warmup(self.num_epochs)
        self.check_accumulation(self.batch_size)
        return self


class MetaConfig(training.MetaConfig):
    """YAML section `meta`."""

    dtype: Literal["bfloat16", "float16", "float32"] = "float32"


class FineTuningOptions(TrainingOptions):
    """Options that these programs have."""

    data: DataConfig
    data_aug: AugConfig | None = None
    """Augmentation of the training clips; null: none."""
    pretrain: PretrainConfig | None = None
    """Pretrained encoder, as for a probe."""
    encoder: EncoderOptions | None = None
    """Encoder that is trained from scratch."""
    optimization: OptimizationConfig
    meta: MetaConfig = MetaConfig()

    def check_encoder(self) -> None:
        """Raise ValueError where the encoder has no tokens, or a pretrained one is given other sizes of tokens."""
        if self.pretrain is not None and (self.data.patch_size, self.data.tubelet_size) != (None, None):
            raise ValueError("data.patch_size, data.tubelet_size: the pretrained encoder has its own; remove them")
        if self.encoder is not None:
            check_returns_tokens(self.encoder, "encoder")


def initial_encoder(options: FineTuningOptions) -> Encoder:
    """Load the encoder that `pretrain` names, or build that of `encoder`. Raises ConfigError where it does not fit."""
    data, side = options.data, options.optimization.resolution
    if options.pretrain is not None:
        return load(options.pretrain, data.frames_per_clip, side)
    clip = ClipShape(data.frames_per_clip, side, data.patch_size or 16, data.tubelet_size or 2)
    try:
        return build_encoder(options.encoder, clip)  # type: ignore[arg-type]  # None is an error that names the key
    except ValueError as error:
        raise ConfigError(f"encoder, optimization.resolution or data.frames_per_clip: {error}") from None


def make_trainer(
    objective: Objective,
    options: FineTuningOptions,
    schedule: Schedule,
    global_batch: int,
    world: World,
    *,
    encoder: Encoder | None,
    data_state: Stateful | None = None,
) -> Trainer:
    """Return the trainer of a program. `encoder` is the one that is trained, which `hub` can read from the run, if any.

    Raises:
        ConfigError: The encoder has no layers for `optimization.layer_decay`.
    """
    # What hub needs to build the encoder, and the normalization of its clips.
    built_from = {} if encoder is None else encoder.built_from
    try:
        return Trainer(
            objective,
            options,
            schedule,
            world,
            global_batch=global_batch,
            batch_size_key="optimization.batch_size",
            config={**built_from, "data_aug": options.data.normalization()},
            data_state=data_state,
        )
    except ValueError as error:
        raise ConfigError(f"optimization.layer_decay: {error}") from None


def fit(
    trainer: Trainer, data: DataConfig, videos: SampleSource, stream: SampleStream, num_workers: int, max_bad: float
) -> BadFiles:
    """Train, or continue the run in the folder, to the last step.

    Args:
        trainer: The trainer.
        data: Section `data` of the options.
        videos: The samples.
        stream: The draws of each step.
        num_workers: Processes that read videos.
        max_bad: Largest fraction of draws that may meet an unreadable video.

    Returns:
        The unreadable files.
    """
    world = trainer.world
    trainer.resume()
    batches = make_train_loader(
        videos,
        stream,
        masks=None,
        seed=trainer.seed,
        first_step=trainer.step,
        last_step=trainer.last_step,
        rank=world.rank,
        world_size=world.world_size,
        num_workers=num_workers,
        pin_memory=world.device.type == "cuda",
        timeout=data.worker_timeout,
    )
    bad_files = BadFiles(trainer.folder / "bad_files.txt", max_bad, world)
    trainer.fit(batches, [BadFileCheck(bad_files)])
    return bad_files
