"""Options of a probe, the YAML of `evals/*_classification_frozen`. Keys that V-JEPA has, too, have its names."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from tubelet.config import RESUME_IGNORED, Config, Square, check_variant, merge
from tubelet.data import NORMALIZATION, AugConfig
from tubelet.models import ENCODERS, check_returns_tokens, drop_lacking_defaults
from tubelet.probing.data_options import EvaluationConfig, ProbeDataConfig, check_one_normalization
from tubelet.probing.heads import HeadOptions
from tubelet.runtime.parallelize import DistributedConfig
from tubelet.training.schedules import NotNegative, Positive, RateConfig

RANDOM = "random"
SHARED_BY_TASKS = (*(("data", name) for name in NORMALIZATION), ("optimization", "use_bfloat16"))


class HeadsConfig(Config):
    """A grid of heads, one for each learning rate and weight decay, trained side by side on the same features.

    Heads that are not trained by gradient descent have another grid: `knn` that of its option `k`.
    """

    lr: list[float] = Field(min_length=1)
    """Learning rates."""
    weight_decay: list[float] = Field(min_length=1)
    """Weight decays."""


class ProbeOptimizationConfig(RateConfig):
    """YAML section `optimization`."""

    attend_across_segments: bool = True
    """Make one prediction from the tokens of all segments; false: one for each, averaged."""
    num_epochs: int = Field(20, ge=1)
    """Passes over the training videos."""
    min_steps: int = Field(0, ge=0)
    """Train for more epochs where `num_epochs` take fewer steps than this."""
    resolution: Square = 224
    """Height and width of the clips in pixels."""
    batch_size: Annotated[int, RESUME_IGNORED] = Field(4, ge=1)
    """Videos of a step in one process."""
    lr: Positive = 1e-3
    start_lr: NotNegative = 1e-3
    final_lr: NotNegative = 0.0
    warmup: NotNegative = 0.0
    weight_decay: NotNegative = 0.01
    use_bfloat16: bool = False
    """Compute in bfloat16 (autocast)."""
    heads: HeadsConfig | None = None
    """Replaces the single head with `lr` and `weight_decay`; `start_lr` and `final_lr` keep their ratio to `lr`."""
    select: Literal["val", "holdout"] = "val"
    """How the best of several heads is selected. `val`: by accuracy on the validation set, as in V-JEPA 2, which is
    optimistic. `holdout`: by accuracy on held-out training videos. The best head is then trained again on all training
    videos, and is the only one that is evaluated on the validation set."""
    holdout_fraction: float = Field(0.2, gt=0, le=0.5)
    """Fraction of the training videos that is held out; see `select`."""
    holdout_folds: int = Field(1, ge=1)
    """Number of disjoint held-out parts to average over; 1 / holdout_fraction for full cross-validation."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ProbeOptimizationConfig":
        if self.holdout_folds > round(1 / self.holdout_fraction):
            raise ValueError(
                f"holdout_folds {self.holdout_folds}: only {round(1 / self.holdout_fraction)} disjoint parts of "
                f"holdout_fraction {self.holdout_fraction} exist"
            )
        self.check_warmup(self.num_epochs)
        return self

    def epochs_of(self, steps_per_epoch: int) -> int:
        return max(self.num_epochs, -(-self.min_steps // steps_per_epoch))

    def grid(self) -> list[tuple[float, float]]:
        """(lr, weight_decay) of each head."""
        if self.heads is None:
            return [(self.lr, self.weight_decay)]
        return [(lr, weight_decay) for lr in self.heads.lr for weight_decay in self.heads.weight_decay]


class PretrainConfig(Config):
    """YAML section `pretrain`: the frozen encoder.

    Of a run and of the published files of V-JEPA, V-JEPA 2 and V-JEPA 2.1 the folder and the file say everything; see
    `tubelet.hub.load_encoder` for others. Options that contradict the weights are refused.
    """

    folder: str | None = None
    """Run folder, or the folder of `checkpoint`."""
    checkpoint: str | None = None
    """File in `folder`, by default the newest of a run; `random` for random weights, drawn with `init_seed`."""
    checkpoint_key: str = "target_encoder"
    """Which encoder, see `tubelet.hub.load_encoder`."""
    encoder: dict[str, Any] = {}
    """Options of the encoder that the file does not say, `{name: vit_large, …}`, or those of random weights."""
    resolution: Square | None = None
    """Height and width of the clips in pretraining; see `frames_per_clip`."""
    frames_per_clip: int | None = Field(None, ge=1)
    """Size of the clips in pretraining. Those of `data` may have another one; positions are then interpolated."""
    patch_size: int | None = Field(None, ge=1)
    """Patch size in pretraining, in pixels."""
    tubelet_size: int | None = Field(None, ge=1)
    """Frames of a tubelet in pretraining."""
    init_seed: int = Field(0, ge=0)
    """Seed of random weights."""

    @field_validator("encoder")
    @classmethod
    def _known_options(cls, encoder: dict[str, Any]) -> dict[str, Any]:
        if "name" in encoder:  # otherwise the options belong to the encoder of a run
            ENCODERS.parse(drop_lacking_defaults(encoder))
        return encoder

    @model_validator(mode="after")
    def _says_enough(self) -> "PretrainConfig":
        if self.folder is None and self.checkpoint != RANDOM:
            raise ValueError("folder: give the run folder of the pretrained encoder, or checkpoint: random")
        if self.folder is None and "name" not in self.encoder:
            raise ValueError("encoder.name: a random encoder needs an architecture: a name, or the folder of a run")
        if "init_std" in self.encoder and self.checkpoint != RANDOM:
            raise ValueError("encoder.init_std is for checkpoint: random only; trained weights are not initialized")
        check_returns_tokens(self.encoder, "encoder")
        return self


class MetaConfig(Config):
    """YAML section `meta`."""

    seed: NonNegativeInt | list[NonNegativeInt] = 0
    """Seed of the few-shot subset, the held-out part, the heads and the order of batches. With a list of seeds, each
    is run, and the results are averaged."""
    save_every_minutes: Annotated[float, RESUME_IGNORED] = Field(5.0, ge=0)
    """Minutes between two checkpoints of the heads."""


class ProbeOptions(Config):
    """A probe of one encoder on one labelled data set, or several probes in `tasks`."""

    eval_name: str
    folder: Annotated[str, RESUME_IGNORED]
    """Run folder: configuration, log, checkpoints and results."""
    head: HeadOptions = Field({}, validate_default=True)
    """What classifies the tokens of the frozen encoder: a head of tubelet/probing/heads."""
    data: ProbeDataConfig
    data_aug: AugConfig | None = None
    """Augmentation of the training videos; by default none."""
    optimization: ProbeOptimizationConfig = ProbeOptimizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    pretrain: PretrainConfig
    distributed: Annotated[DistributedConfig, RESUME_IGNORED] = DistributedConfig()
    meta: MetaConfig = MetaConfig()
    tasks: dict[str, dict[str, Any]] | None = None
    """Several probes of one encoder in one process: name -> keys that differ. Each has the folder `<folder>/<name>`."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ProbeOptions":
        if self.data.cache_features and self.data_aug is not None:
            raise ValueError("data.cache_features stores one version of each clip; remove it or data_aug")
        check_one_normalization(self.data, self.data_aug)
        self.evaluation.check(self.data)
        if self.distributed.kind != "ddp":
            raise ValueError(f"distributed: {self.distributed.kind}: the encoder of a probe is not sharded; remove it")
        for name in self.tasks or {}:
            self.task(name)
        return self

    @property
    def seeds(self) -> list[int]:
        return [self.meta.seed] if isinstance(self.meta.seed, int) else self.meta.seed

    def task(self, name: str) -> "ProbeOptions":
        """The options of one of `tasks`."""
        raw, changes = self.model_dump(), (self.tasks or {})[name]
        head = changes.get("head")
        if isinstance(head, dict) and head.get("name", self.head.name) != self.head.name:
            raw["head"] = {}  # another head has other options
        raw = merge(raw, changes)
        raw |= {"tasks": None, "folder": f"{self.folder}/{name}"}
        if raw["data"]["cache_features"] is True:
            raw["data"]["cache_features"] = f"{self.folder}/features"
        if raw["pretrain"] != self.pretrain.model_dump():
            raise ValueError(f"tasks.{name}.pretrain: all tasks probe one encoder; use another file for another one")
        task = check_variant(raw, type(self), f"tasks.{name}")
        for section, key in SHARED_BY_TASKS:
            if getattr(getattr(task, section), key) != getattr(getattr(self, section), key):
                raise ValueError(
                    f"tasks.{name}.{section}.{key}: all tasks probe one encoder on equal inputs; set it for all of "
                    "them, or use another file"
                )
        return task

    def with_seed(self, seed: int) -> "ProbeOptions":
        """The options for one of several seeds, which has its own folder."""
        raw = merge(self.model_dump(), {"meta": {"seed": seed}, "folder": f"{self.folder}/seed-{seed}"})
        if raw["data"]["cache_features"] is True:
            raw["data"]["cache_features"] = f"{self.folder}/features"
        return type(self).model_validate(raw)
