"""Options of classification and synchronisation of videos with sound: the YAML's sections."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, Config
from tubelet.data import AugConfig
from tubelet.data.sounding_videos import MODALITIES, Modality, SoundConfig
from tubelet.models import EncoderOptions, check_returns_tokens
from tubelet.probing import fine_tuning
from tubelet.probing.options import PretrainConfig
from tubelet.training.schedules import NotNegative


class DataConfig(fine_tuning.DataConfig):
    """YAML section `data`: videos with sound. Clips need `clip_duration` or `fps`."""

    dataset_train: str
    """List with a line `path label` for each video; synchronisation needs no labels, and takes folders, too."""
    dataset_val: str
    """The same for validation."""
    num_classes: int | None = Field(None, ge=2)
    """Of classification."""
    random_clips: bool = True
    """Train on clips from random places; false: from the middle, as in validation."""
    max_bad_fraction: Annotated[float, RESUME_IGNORED] = Field(0.05, ge=0, le=1)
    """Training stops when more than this fraction of the videos drawn so far are unreadable."""


class SpectrogramConfig(Config):
    """YAML section `spectrogram`: what the encoder of the sound sees. The defaults suit speech and events."""

    window: float = Field(0.025, gt=0)
    """Seconds of sound in a frame."""
    hop: float = Field(0.01, gt=0)
    """Seconds from one frame to the next. The patch size of the encoder times this is the duration of its tokens, which
    has to divide the duration of a clip."""
    num_bands: int = Field(64, ge=1)
    """Bands of the mel scale."""
    patch_size: int = Field(16, ge=1)
    """Frames and bands of a patch."""
    floor: float = Field(1e-6, gt=0)
    """Energy that is added to that of a band before the logarithm: what is much quieter, such as noise, is no longer
    seen. A tone of amplitude 1 has about (sample_rate * window / 4)^2."""
    mean: float = -5.0
    """Of the logarithm of the energy in a band, in the training data; for normalization."""
    std: float = Field(4.0, gt=0)
    """Standard deviation of the same, for normalization."""


class FusionConfig(Config):
    """YAML section `fusion`: what reads the tokens of both modalities, which attend to each other.

    Synchronisation with both of them reads their correlation over time instead, `num_heads` values for each lag.
    """

    embed_dim: int = Field(256, ge=8, multiple_of=2)
    """Width of the tokens that are fused."""
    depth: int = Field(2, ge=0)
    """Blocks with cross-attention from each modality to the other."""
    num_heads: int = Field(4, ge=1)
    """Attention heads."""


class SynchronisationConfig(Config):
    """YAML section `synchronisation`: which shifts of the sound are to be told apart."""

    resolution: float = Field(0.25, gt=0)
    """Seconds between two shifts."""
    steps: int = Field(2, ge=1)
    """Largest shift in either direction, in steps of `resolution`. Files have to last as much longer than a clip on
    each side."""

    def shifts(self) -> list[float]:
        """Return the shifts in seconds, ascending; that in the middle is 0."""
        return [step * self.resolution for step in range(-self.steps, self.steps + 1)]


class OptimizationConfig(fine_tuning.OptimizationConfig):
    """YAML section `optimization`."""

    num_epochs: int = Field(30, ge=1)
    """Passes over the training videos."""
    warmup: NotNegative = 2.0


class EvaluationConfig(Config):
    """YAML section `evaluation`. It may be changed and run again."""

    batch_size: int = Field(64, ge=1)
    """Videos evaluated at once."""


class Options(fine_tuning.FineTuningOptions):
    """Learn from videos with sound."""

    app: Literal["audio"] = "audio"
    task: Literal["classification", "synchronisation"]
    """What is learned: the class of a video, or by how much its sound is shifted."""
    modalities: list[Modality] = Field(list(MODALITIES), min_length=1)
    """What the model sees and hears: [video], [sound] or [video, sound]."""
    data: DataConfig
    data_aug: AugConfig | None = None
    """Augmentation of the training clips; null: none. A flip exchanges left and right of the pictures, not of the
    sound."""
    sound: SoundConfig = SoundConfig()
    spectrogram: SpectrogramConfig = SpectrogramConfig()
    pretrain: PretrainConfig | None = None
    """Pretrained encoder of the clips, as for a probe."""
    encoder: EncoderOptions | None = None
    """Encoder of the clips that is trained from scratch."""
    train_encoder: bool = True
    """Train the encoder of the clips, too; false: it is frozen."""
    sound_encoder: EncoderOptions = Field("vit_small", validate_default=True)
    """Encoder of the spectrogram, which it takes for a picture."""
    fusion: FusionConfig = FusionConfig()
    synchronisation: SynchronisationConfig = SynchronisationConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: Annotated[EvaluationConfig, RESUME_IGNORED] = EvaluationConfig()

    @model_validator(mode="after")
    def _check_parts(self) -> "Options":
        if self.modalities != [name for name in MODALITIES if name in self.modalities]:
            raise ValueError(f"modalities: expected [video], [sound] or [video, sound], not {self.modalities}")
        if "video" in self.modalities and (self.pretrain is None) == (self.encoder is None):
            raise ValueError("give either `pretrain`, a pretrained encoder, or `encoder`, one to train from scratch")
        if self.pretrain is None and not self.train_encoder and "video" in self.modalities:
            raise ValueError("train_encoder: an encoder from scratch has to be trained; remove it, or set it to true")
        self.check_encoder()
        check_returns_tokens(self.sound_encoder, "sound_encoder")
        if self.data.frame_step is not None:
            raise ValueError(
                "data.frame_step: clips with sound need the same duration in all files; give data.clip_duration "
                "(seconds) or data.fps instead"
            )
        if self.task == "classification" and self.data.num_classes is None:
            raise ValueError("data.num_classes: classification needs the number of classes")
        if self.task == "synchronisation" and self.sound.missing == "silence":
            raise ValueError("sound.missing: silence has no shift; set it to exclude for synchronisation")
        if self.distributed.kind != "ddp":
            raise ValueError(f"distributed: {self.distributed.kind} is not supported for this program; take ddp")
        return self
