"""Options of captioning, question answering and retrieval: the YAML's sections."""

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from tubelet.config import RESUME_IGNORED, Config
from tubelet.data import AugConfig
from tubelet.language.decoding import DecodingConfig
from tubelet.language.prefix_lm import LanguageModelConfig
from tubelet.probing import fine_tuning
from tubelet.training.schedules import NotNegative


class DataConfig(fine_tuning.DataConfig):
    """YAML section `data`: lists of texts, and the videos that they are about."""

    dataset_train: str
    """Captions or questions, see `tubelet.language.annotations` for the formats."""
    dataset_val: str
    """The same for validation."""
    videos: str
    """Folder with the videos; the name of a file is its identifier in the lists."""
    split_train: str | None = None
    """Of a list of MSR-VTT with several splits, the one to train on; null: all of the list."""
    split_val: str | None = None
    """The same for validation."""
    texts_per_video: int = Field(1, ge=1)
    """Captions or questions that share a clip in training, so that an encoder that is trained along encodes it once for
    all of them. `optimization.batch_size` counts clips. A video with fewer texts has some of them repeated."""
    cache_features: Annotated[bool | str, RESUME_IGNORED] = False
    """Of a frozen encoder: extract the features once, without augmentation, into `<folder>/features` (true) or the
    given folder, and train on them."""
    max_bad_fraction: Annotated[float, RESUME_IGNORED] = Field(0.05, ge=0, le=1)
    """Training stops when more than this fraction of the draws met an unreadable video."""


class PoolerConfig(Config):
    """YAML section `pooler`: learned queries read the tokens of the video for the language model."""

    num_queries: int = Field(8, ge=1)
    """Tokens that the language model reads of a video."""
    depth: int = Field(1, ge=1)
    """Blocks, the last of which is the cross-attention of the queries."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights; a narrow pooler learns faster with 0.1."""


class TextConfig(Config):
    """YAML section `text`."""

    prompt: str = ""
    """Read after the video and before the caption; in question answering, with {question} in the place of it."""
    max_prompt: int = Field(32, ge=0)
    """Tokens of a prompt or question; longer ones lose their beginning. They are counted in results.json."""
    max_target: int = Field(40, ge=2)
    """Tokens of a caption or answer; longer ones lose their end, and are counted, too."""


class AnswersConfig(Config):
    """YAML section `answers`: how questions are answered."""

    kind: Literal["generated", "classified"] = "generated"
    """Answers are written by the language model, or chosen among the frequent ones by a linear layer. Where a question
    has options to choose from, the generated answer is the most probable of them."""
    vocabulary: int = Field(1000, ge=2)
    """Of classified answers: so many of the most frequent answers of training can be given. The number of other ones,
    which are left out in training and count as errors in validation, is in results.json."""


class AlignmentConfig(Config):
    """YAML section `alignment`: embeddings of videos and texts, for retrieval."""

    embed_dim: int = Field(256, ge=1)
    """Width of the embeddings."""
    temperature: float = Field(0.07, gt=0)
    """Initial temperature of the contrastive loss, which is learned."""


class ZeroShotConfig(Config):
    """YAML section `evaluation.zero_shot`: classification by the most similar class name."""

    dataset: str
    """List with a line `path label` for each video."""
    class_names: list[str] = Field(min_length=2)
    """A text for each label."""
    template: str = "{}"
    """The text of a class, with {} in the place of its name."""

    @field_validator("template")
    @classmethod
    def _has_a_name(cls, template: str) -> str:
        if "{}" not in template:
            raise ValueError(f"'{template}' has no {{}} in the place of the name")
        return template


class OptimizationConfig(fine_tuning.OptimizationConfig):
    """YAML section `optimization`."""

    num_epochs: int = Field(10, ge=1)
    """Passes over the training samples."""
    warmup: NotNegative = 1.0


class EvaluationConfig(Config):
    """YAML section `evaluation`. It may be changed and run again."""

    batch_size: int = Field(64, ge=1)
    """Samples that are evaluated at once in one process."""
    swap_videos: bool = False
    """Also evaluate with the videos exchanged between the samples: what the model tells without looking."""
    lists: dict[str, str] = {}
    """Further lists to evaluate on, name: file. The metrics of each are in results.json, in `further`."""
    examples: int = Field(16, ge=0)
    """Videos shown in examples.html with references and predictions."""
    zero_shot: ZeroShotConfig | None = None
    """After retrieval: classify videos by the most similar class name."""


class Options(fine_tuning.FineTuningOptions):
    """Write texts about videos, answer questions about them, or find them by texts."""

    app: Literal["language"] = "language"
    task: Literal["captioning", "question_answering", "retrieval"]
    """What is learned and measured."""
    data: DataConfig
    data_aug: AugConfig | None = None
    """Augmentation of the training clips; null: none. A flip changes left to right in the video, not in the text."""
    train_encoder: bool = False
    """Train the encoder, too; false: it is frozen."""
    blind: bool = False
    """Replace the tokens of the video by zeros, for comparison: what can be told without seeing it."""
    pooler: PoolerConfig = PoolerConfig()
    language_model: LanguageModelConfig = LanguageModelConfig()
    text: TextConfig = TextConfig()
    answers: AnswersConfig = AnswersConfig()
    alignment: AlignmentConfig = AlignmentConfig()
    decoding: Annotated[DecodingConfig, RESUME_IGNORED] = DecodingConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    evaluation: Annotated[EvaluationConfig, RESUME_IGNORED] = EvaluationConfig()

    @model_validator(mode="after")
    def _check_parts(self) -> "Options":
        self.check_encoder()
        if self.encoder is not None and not self.train_encoder:
            raise ValueError("train_encoder: an encoder from scratch has to be trained; set it to true")
        if self.data.cache_features and (self.train_encoder or self.data_aug is not None):
            raise ValueError(
                "data.cache_features stores one version of each clip under a frozen encoder; remove it, or "
                "train_encoder and data_aug"
            )
        if self.task != "question_answering" and "{question}" in self.text.prompt:
            raise ValueError(f"text.prompt: {self.task} has no {{question}}; remove it")
        if self.task != "question_answering" and self.answers.kind == "classified":
            raise ValueError(f"answers.kind: {self.task} has no answers; remove it")
        if self.task == "retrieval" and self.optimization.accumulation_steps > 1:
            raise ValueError(
                "optimization.accumulation_steps: the other pairs of a part would be its only negatives, not those of "
                "the step; set it to 1"
            )
        if self.task == "retrieval" and self.data.texts_per_video > 1:
            raise ValueError("data.texts_per_video: retrieval compares a video with one text; set it to 1")
        if self.task != "retrieval" and self.evaluation.zero_shot is not None:
            raise ValueError(f"evaluation.zero_shot needs task: retrieval, not {self.task}")
        if taken := {"train", "val"} & self.evaluation.lists.keys():
            raise ValueError(f"evaluation.lists: {taken.pop()} is the name of a list of `data`; choose another one")
        if self.distributed.kind != "ddp":
            raise ValueError(f"distributed: {self.distributed.kind} is not supported for this program; take ddp")
        return self
