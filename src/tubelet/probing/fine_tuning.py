"""What programs have in common that train a task on an encoder, which is new or pretrained, frozen or trained along."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, ConfigError
from tubelet.data import AugConfig
from tubelet.data.bad_files import BadFiles
from tubelet.data.streams import SampleStream
from tubelet.data.video_dataset import Dataset
from tubelet.grid import ClipShape
from tubelet.models import EncoderOptions, build_encoder, check_returns_tokens
from tubelet.models.interfaces import Encoder
from tubelet.probing.data_options import ClipsConfig
from tubelet.probing.encoder import load, with_normalization
from tubelet.probing.options import PretrainConfig
from tubelet.runtime.distributed import World
from tubelet.runtime.precision import Precision
from tubelet.runtime.run_folder import check_same_configuration
from tubelet.training import options as training
from tubelet.training import schedules
from tubelet.training.fit import LoadingOptions, fit
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

    dtype: Annotated[Precision, RESUME_IGNORED] = "float32"


class FineTuningOptions(TrainingOptions):
    """Options that these programs have."""

    data: DataConfig
    data_aug: AugConfig | None = None
    """Augmentation of the training clips; null: none."""
    pretrain: PretrainConfig | None = None
    """Pretrained encoder, as for a probe."""
    encoder: EncoderOptions | None = None
    """Encoder that is trained from scratch; null: the one that `pretrain` names. One of the two has to be given."""
    optimization: OptimizationConfig
    meta: MetaConfig = MetaConfig()

    def check_encoder(self) -> None:
        """Raise ValueError where not one of `pretrain` and `encoder` is given, or it does not fit the other options."""
        if (self.pretrain is None) == (self.encoder is None):
            # No default: forgetting `pretrain` would train another encoder, from random weights.
            raise ValueError("give either `pretrain`, a pretrained encoder, or `encoder`, one to train from scratch")
        if self.pretrain is not None and (self.data.patch_size, self.data.tubelet_size) != (None, None):
            raise ValueError("data.patch_size, data.tubelet_size: the pretrained encoder has its own; remove them")
        if self.encoder is not None:
            check_returns_tokens(self.encoder, "encoder")


Options = TypeVar("Options", bound=FineTuningOptions)


def resolve(options: Options, world: World) -> Options:
    """Return the options with the encoder's normalization, see `with_normalization`.

    Raises:
        ConfigError: The folder holds a run of another configuration.
    """
    options = world.broadcast_from_rank0(lambda: with_normalization(options))
    world.broadcast_from_rank0(lambda: check_same_configuration(Path(options.folder), options))
    return options


def initial_encoder(options: FineTuningOptions) -> Encoder:
    """Load the encoder that `pretrain` names, or build that of `encoder`. Raises ConfigError where it does not fit."""
    data, side = options.data, options.optimization.resolution
    if options.pretrain is not None:
        return load(options.pretrain, data.frames_per_clip, side)
    clip = ClipShape(data.frames_per_clip, side, data.patch_size or 16, data.tubelet_size or 2)
    assert options.encoder is not None  # see `check_encoder`
    try:
        return build_encoder(options.encoder, clip)
    except ValueError as error:
        raise ConfigError(f"encoder, optimization.resolution or data.frames_per_clip: {error}") from None


def make_trainer(
    objective: Objective,
    options: FineTuningOptions,
    schedule: Schedule,
    world: World,
    *,
    data_state: Stateful | None = None,
) -> Trainer:
    """Return the trainer of a program, from whose checkpoints `hub` can read the encoder that is trained, if any.

    Raises:
        ConfigError: The encoder has no layers for `optimization.layer_decay`.
    """
    # What hub needs to build the encoder, and the normalization of its clips.
    encoder: Any = objective.encoders().get("encoder")
    built_from = {} if encoder is None else encoder.built_from
    try:
        return Trainer(
            objective,
            options,
            schedule,
            world,
            global_batch=options.optimization.batch_size * world.world_size,
            batch_size_key="optimization.batch_size",
            config={**built_from, "data_aug": options.data.normalization()},
            data_state=data_state,
        )
    except ValueError as error:
        raise ConfigError(f"optimization.layer_decay: {error}") from None


def train(
    objective: Objective,
    options: FineTuningOptions,
    dataset: Dataset,
    loading: LoadingOptions,
    world: World,
    *,
    data_state: Stateful | None = None,
) -> BadFiles:
    """Train for `optimization.num_epochs` passes over the samples, or continue the run in the folder.

    Args:
        objective: What is learned.
        options: Options of the program.
        dataset: The training samples.
        loading: How they are loaded: section `data` of the options.
        world: The processes of the run.
        data_state: State of the samples that checkpoints hold, if any.

    Returns:
        The unreadable files.
    """
    o = options.optimization
    stream = SampleStream(dataset.sizes, None, o.batch_size * world.world_size, options.meta.seed)
    schedule = Schedule(o, o.num_epochs * stream.steps_per_pass, stream.steps_per_pass)
    trainer = make_trainer(objective, options, schedule, world, data_state=data_state)
    return fit(trainer, dataset, stream, loading)
