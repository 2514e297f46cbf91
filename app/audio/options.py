"""Options of classification, synchronisation and retrieval of videos with sound: the YAML's sections."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, Config
from tubelet.data import AugConfig
from tubelet.data.sounding_videos import MODALITIES, Modality, SoundConfig
from tubelet.models import EncoderOptions, check_returns_tokens
from tubelet.models.sound import SpectrogramConfig
from tubelet.probing import fine_tuning
from tubelet.probing.options import RANDOM, PretrainConfig
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


class SoundPretrainConfig(Config):
    """YAML section `sound_pretrain`: the pretrained encoder of the sound, and the spectrogram of its pretraining."""

    folder: str
    """Run folder of pretraining with sound, or of this program."""
    checkpoint: str | None = None
    """File in `folder`, by default the newest of the run; `random` for random weights, drawn with `init_seed`."""
    checkpoint_key: str = "target_sound_encoder"
    """Which encoder: `target_sound_encoder` or `sound_encoder`; see `tubelet.hub.load_sound_encoder`."""
    init_seed: int = Field(0, ge=0)
    """Seed of random weights."""

    @property
    def random(self) -> bool:
        return self.checkpoint == RANDOM


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


class AlignmentConfig(Config):
    """YAML section `alignment`: embeddings of videos and sounds, for retrieval."""

    embed_dim: int = Field(256, ge=1)
    """Width of the embeddings."""
    temperature: float = Field(0.07, gt=0)
    """Initial temperature of the contrastive loss, which is learned."""


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
    task: Literal["classification", "synchronisation", "retrieval"]
    """What is learned: the class of a video, by how much its sound is shifted, or embeddings that find the sound of a
    video and the video of a sound."""
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
    """Encoder of the clips that is trained from scratch; null: the one that `pretrain` names. One of the two has to be
    given where `modalities` include video."""
    train_encoder: bool = True
    """Train the pretrained encoders, too; false: they are frozen. Those from scratch are always trained."""
    sound_pretrain: SoundPretrainConfig | None = None
    """Pretrained encoder of the sound; the sections `spectrogram` and `sound_encoder` are then not read."""
    sound_encoder: EncoderOptions = Field("vit_small", validate_default=True)
    """Encoder of the spectrogram, which it takes for a picture, that is trained from scratch."""
    fusion: FusionConfig = FusionConfig()
    synchronisation: SynchronisationConfig = SynchronisationConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: Annotated[EvaluationConfig, RESUME_IGNORED] = EvaluationConfig()

    @model_validator(mode="after")
    def _check_parts(self) -> "Options":
        if self.modalities != [name for name in MODALITIES if name in self.modalities]:
            raise ValueError(f"modalities: expected [video], [sound] or [video, sound], not {self.modalities}")
        if "video" in self.modalities:
            self.check_encoder()
        if not self.train_encoder and self.pretrain is None and self.sound_pretrain is None:
            raise ValueError("train_encoder: encoders from scratch have to be trained; remove it, or set it to true")
        check_returns_tokens(self.sound_encoder, "sound_encoder")
        if self.data.frame_step is not None:
            raise ValueError(
                "data.frame_step: clips with sound need the same duration in all files; give data.clip_duration "
                "(seconds) or data.fps instead"
            )
        if self.task == "classification" and self.data.num_classes is None:
            raise ValueError("data.num_classes: classification needs the number of classes")
        if self.task != "classification" and self.sound.missing == "silence":
            raise ValueError(
                f"sound.missing: silence has no shift, and is that of no video; set it to exclude for {self.task}"
            )
        if self.task == "retrieval" and len(self.modalities) < 2:
            raise ValueError(f"modalities: retrieval needs [video, sound], not {self.modalities}")
        if self.task == "retrieval" and self.optimization.accumulation_steps > 1:
            raise ValueError(
                "optimization.accumulation_steps: the loss of retrieval compares all videos of a step; set it to 1"
            )
        if self.distributed.kind != "ddp":
            raise ValueError(f"distributed: {self.distributed.kind} is not supported for this program; take ddp")
        return self
