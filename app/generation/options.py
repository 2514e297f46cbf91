"""Options of future-frame prediction: the YAML's sections."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, Config, Square, check_part
from tubelet.data import AugConfig, DataFormat, Decoder
from tubelet.data import DataConfig as ClipsConfig
from tubelet.data.moving_mnist import SIDE
from tubelet.generation.feature_decoder import DecoderConfig, PretrainConfig
from tubelet.generation.latent_video import MULTIPLE as LATENT_MULTIPLE
from tubelet.generation.latent_video import LatentConfig
from tubelet.grid import ClipShape
from tubelet.models import EncoderOptions
from tubelet.probing.options import PretrainConfig as EncoderConfig
from tubelet.runtime.precision import Precision
from tubelet.training import options as training
from tubelet.training import schedules
from tubelet.training.options import TrainingOptions
from tubelet.training.schedules import NotNegative, Positive


class DataConfig(Config):
    """YAML section `data`: clips of `num_frames` frames that are seen and the frames that follow them."""

    format: DataFormat = Field({}, validate_default=True)
    """`video_dataset` for folders and lists of video files, `moving_mnist`, `kth`, or a format of your own."""
    train: list[str] = Field(min_length=1)
    """Training videos: folders, lists or files, as the format reads them."""
    test: Annotated[list[str], RESUME_IGNORED] = Field(min_length=1)
    """Test videos, likewise."""
    num_frames: int = Field(10, ge=2)
    """Frames that are seen."""
    num_target_frames: int = Field(10, ge=1)
    """Frames that are predicted at once, and in training."""
    frame_step: int = Field(1, ge=1)
    """Take every n-th frame of the file."""
    channels: Literal[1, 3] = 3
    """1 for grayscale."""
    crop_size: Square = 64
    """Height and width of the frames in pixels."""
    patch_size: int = Field(8, ge=1)
    """Height and width of a patch in pixels."""
    tubelet_size: int = Field(1, ge=1)
    """Frames of a tubelet."""
    normalize_mean: float = 0.5
    """Mean of the seen frames, from 0 to 1, for normalization; a pretrained encoder has its own."""
    normalize_std: float = Field(0.25, gt=0)
    """Standard deviation of the seen frames; see `normalize_mean`."""

    batch_size: Annotated[int, RESUME_IGNORED] = Field(16, ge=1)
    """Clips of a step in one process; their number in all processes may not change when a run is resumed."""
    num_workers: Annotated[int, RESUME_IGNORED] = Field(2, ge=0)
    """Processes that read videos, for each process of the program; 0: read in the process itself."""
    pin_mem: Annotated[bool, RESUME_IGNORED] = True
    """Put batches into pinned memory, for faster copies to a GPU."""
    worker_timeout: Annotated[int, RESUME_IGNORED] = Field(300, ge=0)
    """Seconds without a batch from a worker after which its video counts as unreadable; 0: wait without limit."""
    decoder: Decoder = Decoder()
    max_bad_fraction: Annotated[float, RESUME_IGNORED] = Field(0.05, ge=0, le=1)
    """Training stops when more than this fraction of the draws met an unreadable video."""
    cache: Annotated[str | None, RESUME_IGNORED] = None
    """Folder for decoded videos (uint8), shared by workers and runs; for small sets of short videos."""

    def clips(self, entries: list[str], num_frames: int, *, at_random: bool) -> ClipsConfig:
        """Return the options of a data set of clips of `num_frames` frames; shorter videos are left out."""
        raw = {
            "datasets": entries,
            "format": self.format.model_dump(),
            "num_frames": num_frames,
            "sampling_rate": self.frame_step,
            "random_clip_sampling": at_random,
            "filter_short_videos": True,
            "crop_size": self.crop_size,
            "patch_size": 1,  # the model checks whether its patches tile the frame
            "tubelet_size": 1,
            "decoder": self.decoder.model_dump(),
            "num_workers": self.num_workers,
            "cache": self.cache,
        }
        return check_part(raw, ClipsConfig, "data")

    @property
    def clip(self) -> ClipShape:
        """Size of the frames that are seen, and of their tubelets."""
        return ClipShape(self.num_frames, self.crop_size, self.patch_size, self.tubelet_size)


class OptimizationConfig(schedules.OptimizationConfig):
    """YAML section `optimization`."""

    steps: int = Field(10_000, ge=1)
    """Steps of the run."""
    loss: Literal["l1", "l2"] = "l2"
    """l2 predicts the mean of the possible futures, l1 the median, which is sharper and darker."""
    warmup: NotNegative = 500
    """Steps of linear warm-up of the learning rate."""
    start_lr: NotNegative = 0.0
    lr: Positive = 1e-3
    final_lr: NotNegative = 1e-6
    weight_decay: NotNegative = 0.05
    clip_grad: float | None = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _check_warmup(self) -> "OptimizationConfig":
        self.check_warmup(self.steps, "steps")
        return self


class EvaluationConfig(Config):
    """YAML section `evaluation`: what is measured and drawn after training. It may be changed and run again."""

    num_frames: int | None = Field(None, ge=1)
    """Frames to predict; beyond `data.num_target_frames` the model goes on from its own frames."""
    num_clips: int | None = Field(None, ge=1)
    """Test clips, evenly over the set; null: all."""
    pictures: int = Field(4, ge=1)
    """Clips shown in prediction.png and prediction.gif."""
    draws: int = Field(4, ge=1)
    """Answers shown side by side where the model has several: noised latents or targets."""
    features: EncoderConfig | None = None
    """Frozen encoder in whose features the distributions of true and predicted futures are compared (Fréchet distance,
    like FVD): a run in `folder`, or random weights with `checkpoint: random` and `encoder: {name: …}`."""
    digits: bool = False
    """Have a classifier of digits read the predicted frames. `data.train` and `data.test` then each start with images
    of MNIST, with the files of labels beside them."""
    classifier_steps: int = Field(600, ge=1)
    """Training steps of the classifier of digits."""
    fps: float = Field(5.0, gt=0)
    """Of the GIF."""


class MetaConfig(training.MetaConfig):
    """YAML section `meta`."""

    dtype: Annotated[Precision, RESUME_IGNORED] = "float32"


class Options(TrainingOptions):
    """Prediction of future frames, by an `encoder` that is trained for it or on top of a pretrained V-JEPA."""

    app: Literal["generation"] = "generation"
    data: DataConfig
    data_aug: AugConfig | None = None
    """Augmentation of the training clips; null: the center of the frame."""
    encoder: EncoderOptions | None = None
    """Model that predicts frames, such as generative_timesformer_tiny."""
    pretrain: PretrainConfig | None = None
    """Frozen V-JEPA whose predicted features a pixel decoder learns to paint."""
    latent: LatentConfig | None = None
    """Codec of frames and diffusion model of its latents, trained together."""
    decoder: DecoderConfig = DecoderConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: Annotated[EvaluationConfig, RESUME_IGNORED] = EvaluationConfig()
    meta: MetaConfig = MetaConfig()

    @model_validator(mode="after")
    def _check_parts(self) -> "Options":
        self.optimization.check_accumulation(self.data.batch_size)
        if sum(part is not None for part in (self.encoder, self.pretrain, self.latent)) != 1:
            raise ValueError(
                "give either `encoder`, which is trained to predict frames, or `pretrain`, a run of app.vjepa, or "
                "`latent`, a diffusion model of latents"
            )
        if self.latent is not None:
            height, width = self.data.clip.height, self.data.clip.width
            if height % LATENT_MULTIPLE or width % LATENT_MULTIPLE:
                raise ValueError(f"data.crop_size: {self.data.crop_size} is not a multiple of {LATENT_MULTIPLE}")
            if self.latent.sampling_steps > self.latent.noise_steps:
                raise ValueError(
                    f"latent.sampling_steps: {self.latent.sampling_steps} is more than latent.noise_steps "
                    f"{self.latent.noise_steps}"
                )
        if self.evaluation.digits and (self.data.channels != 1 or self.data.format.name != "moving_mnist"):
            raise ValueError("evaluation.digits: needs data.format: moving_mnist and data.channels: 1")
        if self.evaluation.digits and self.data.crop_size != SIDE:
            raise ValueError(f"evaluation.digits: needs data.crop_size: {SIDE}, the size at which digits are drawn")
        if self.pretrain is not None and self.data.channels != 3:
            raise ValueError(f"data.channels: {self.data.channels}, but pretraining sees colors; set it to 3")
        if self.distributed.kind != "ddp":
            raise ValueError(f"distributed: {self.distributed.kind} is not supported for frame prediction; take ddp")
        return self

    def num_predicted(self) -> int:
        """Return the number of frames that the evaluation predicts."""
        return self.evaluation.num_frames or self.data.num_target_frames
