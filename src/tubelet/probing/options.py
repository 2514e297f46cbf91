"""Options of a probe: the YAML of `evals/*_classification_frozen`, with V-JEPA's names where they mean the same."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from tubelet.config import Config, Triple, merge
from tubelet.config.registry import name_of
from tubelet.data import NORMALIZATION, AugConfig, Decoder
from tubelet.layers.positions import RopePairing
from tubelet.models import check_returns_tokens
from tubelet.runtime.parallelize import DistributedConfig
from tubelet.training.schedules import NotNegative, Positive, RateConfig

RANDOM = "random"
SHARED_BY_TASKS = (*(("data", name) for name in NORMALIZATION), ("optimization", "use_bfloat16"))
FRAME_RATES = ("frame_step", "fps", "clip_duration")


class LabelledDataConfig(Config):
    """YAML section `data`: labelled videos (or images) for training and validation."""

    dataset_train: str
    """A list (`path label` a line) or, for `image_dataset`, a folder with one subfolder a class."""
    dataset_val: str
    dataset_type: name_of("data", "Dataset") = "VideoDataset"
    num_classes: int = Field(ge=2)
    frames_per_clip: int = Field(16, ge=1)
    num_segments: int = Field(1, ge=1)
    """Clips of a video, one from each of as many equal parts of it."""
    num_views_per_segment: int = Field(1, ge=1)
    """Spatial crops of a clip in validation; training sees one."""
    frame_step: int | None = Field(None, ge=1)
    """Take every n-th frame of the file; or give `fps` (frames of the clip a second), or `clip_duration` (seconds).
    Every 4th where none is given."""
    fps: float | None = Field(None, gt=0)
    clip_duration: float | None = Field(None, gt=0)
    decoder: Decoder = "pyav"
    labels_per_class: int | None = Field(None, ge=1)
    """Train on that many videos of each class, drawn from `meta.seed`; by default on all."""
    on_bad_video: Literal["raise", "exclude"] = "raise"
    """A file that cannot be read: an error, or an exclusion that results.json reports."""
    num_workers: int = Field(2, ge=0)
    worker_timeout: int = Field(300, ge=0)
    """Seconds without a batch from a worker before the video it is stuck at counts as unreadable; 0: wait for ever."""
    cache: str | None = None
    """Folder for decoded videos, shared by workers and runs; for small sets of short videos."""
    normalize_mean: Triple | None = None
    normalize_std: Triple | None = None
    """Of the colours in 0..1. By default the pretraining's own where its file says them, else ImageNet's."""

    def normalization(self) -> dict[str, tuple[float, float, float] | None]:
        return {name: getattr(self, name) for name in NORMALIZATION}

    @model_validator(mode="before")
    @classmethod
    def _every_fourth_frame(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and all(raw.get(name) is None for name in FRAME_RATES):
            return raw | {"frame_step": 4}
        return raw

    @model_validator(mode="after")
    def _one_frame_rate(self) -> "LabelledDataConfig":
        given = [name for name in FRAME_RATES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} given; keep one of {', '.join(FRAME_RATES)}, the others null")
        return self


def check_one_normalization(data: LabelledDataConfig, augmentation: AugConfig | None) -> None:
    """Raises ValueError where `data_aug`, whose noise has the colours of `data`, says others."""
    for name in NORMALIZATION if augmentation is not None else ():
        if getattr(augmentation, name) not in (getattr(data, name), getattr(AugConfig(), name)):
            raise ValueError(f"data_aug.{name}: clips are normalised by data.{name} here; set that, and remove this")


class ProbeDataConfig(LabelledDataConfig):
    """What a frozen encoder adds: its features can be kept."""

    cache_features: bool | str = False
    """Extract the features once, without augmentation, into `<folder>/features` (true) or the folder given here. They
    are kept by encoder, video and clip options, not by label: tasks on the same videos share them."""


class HeadsConfig(Config):
    """A grid of heads: one of each learning rate and weight decay, trained at once on the same features."""

    lr: list[float] = Field(min_length=1)
    weight_decay: list[float] = Field(min_length=1)


class ProbeOptimizationConfig(RateConfig):
    """YAML section `optimization`."""

    attend_across_segments: bool = True
    """One prediction from the tokens of all segments; false: one each, averaged."""
    num_epochs: int = Field(20, ge=1)
    min_steps: int = Field(0, ge=0)
    """More epochs where `num_epochs` take fewer steps: few videos need more of them."""
    resolution: int = Field(224, ge=1)
    batch_size: int = Field(4, ge=1)
    """Videos of a step in one process."""
    lr: Positive = 1e-3
    start_lr: NotNegative = 1e-3
    final_lr: NotNegative = 0.0
    warmup: NotNegative = 0.0
    weight_decay: NotNegative = 0.01
    use_bfloat16: bool = False
    heads: HeadsConfig | None = None
    """Replaces the single head with `lr` and `weight_decay`; `start_lr` and `final_lr` keep their ratio to `lr`."""
    select: Literal["val", "holdout"] = "val"
    """What names the best head of several. `val`: accuracy on the validation set, as V-JEPA 2 does; the best of many
    is then optimistic. `holdout`: accuracy on training videos held out for that, after which the best head alone is
    trained again on all of them, and validation is looked at once."""
    holdout_share: float = Field(0.2, gt=0, le=0.5)
    holdout_folds: int = Field(1, ge=1)
    """How many disjoint held-out parts to average over; as many as 1 / holdout_share for full cross-validation."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ProbeOptimizationConfig":
        if self.holdout_folds > round(1 / self.holdout_share):
            raise ValueError(
                f"holdout_folds {self.holdout_folds}: only {round(1 / self.holdout_share)} disjoint parts of "
                f"holdout_share {self.holdout_share} exist"
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


class ClassifierConfig(Config):
    """YAML section `classifier`: the attentive head, with V-JEPA 2's names."""

    num_heads: int | None = Field(None, ge=1)
    """Attention heads; by default the encoder's."""
    num_probe_blocks: int = Field(1, ge=1)


class PretrainConfig(Config):
    """YAML section `pretrain`: where the frozen encoder comes from.

    What a file says itself (a run folder says everything) need not be given; a released file needs the architecture.
    """

    folder: str | None = None
    """A run folder, or the folder of `checkpoint`."""
    checkpoint: str | None = None
    """File in `folder` (by default the newest of a run); `random`: weights drawn from `init_seed`, nothing trained."""
    checkpoint_key: Literal["target_encoder", "encoder"] = "target_encoder"
    encoder: str | None = None
    model_name: str | None = None
    encoder_args: dict[str, Any] | None = None
    resolution: int | None = Field(None, ge=1)
    frames_per_clip: int | None = Field(None, ge=1)
    """Of the pretraining; the clips of `data` may differ, positions are then interpolated."""
    patch_size: int | None = Field(None, ge=1)
    tubelet_size: int | None = Field(None, ge=1)
    uniform_power: bool | None = None
    use_rope: bool | None = None
    rope_pairing: RopePairing | None = None
    use_silu: bool | None = None
    wide_silu: bool | None = None
    use_activation_checkpointing: bool | None = None
    init_std: float | None = Field(None, gt=0)
    """Standard deviation of random weights."""
    init_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _says_enough(self) -> "PretrainConfig":
        if self.folder is None and self.checkpoint != RANDOM:
            raise ValueError("folder: give the run folder of the pretrained encoder, or checkpoint: random")
        if self.folder is None and self.model_name is None:
            raise ValueError("model_name: a random encoder needs an architecture: model_name, or the folder of a run")
        if self.init_std is not None and self.checkpoint != RANDOM:
            raise ValueError("init_std goes with checkpoint: random only; trained weights are not drawn")
        check_returns_tokens(self.encoder_args or {}, "encoder_args")
        return self


class MetaConfig(Config):
    """YAML section `meta`."""

    seed: NonNegativeInt | list[NonNegativeInt] = 0
    """Of the few-shot subset, the held-out part, the heads and the order of batches. A list runs each and averages."""
    save_every_minutes: float = Field(5.0, ge=0)


class ProbeOptions(Config):
    """A probe of one encoder on one labelled data set; or several, in `tasks`."""

    eval_name: str
    folder: str
    head: Literal["attentive", "linear"] = "attentive"
    data: ProbeDataConfig
    data_aug: AugConfig | None = None
    """Augmentation of the training videos; none by default."""
    optimization: ProbeOptimizationConfig = ProbeOptimizationConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    pretrain: PretrainConfig
    distributed: DistributedConfig = DistributedConfig()
    meta: MetaConfig = MetaConfig()
    tasks: dict[str, dict[str, Any]] | None = None
    """Name -> keys that differ: several probes of one encoder in one process, each in `<folder>/<name>`."""

    @model_validator(mode="after")
    def _fits_together(self) -> "ProbeOptions":
        if self.data.cache_features and self.data_aug is not None:
            raise ValueError("data.cache_features keeps one version of each clip; remove data_aug or the cache")
        check_one_normalization(self.data, self.data_aug)
        if self.distributed.kind != "ddp":
            raise ValueError(f"distributed: {self.distributed.kind}: a probe's encoder is not sharded; remove it")
        for name in self.tasks or {}:
            self.task(name)
        return self

    @property
    def seeds(self) -> list[int]:
        return [self.meta.seed] if isinstance(self.meta.seed, int) else self.meta.seed

    def task(self, name: str) -> "ProbeOptions":
        """The options of one of `tasks`."""
        raw = merge(self.model_dump(), self.tasks[name])
        raw |= {"tasks": None, "folder": f"{self.folder}/{name}"}
        if raw["data"]["cache_features"] is True:
            raw["data"]["cache_features"] = f"{self.folder}/features"
        if raw["pretrain"] != self.pretrain.model_dump():
            raise ValueError(f"tasks.{name}.pretrain: all tasks probe one encoder; use another file for another one")
        try:
            task = type(self).model_validate(raw)
        except ValidationError as error:
            lines = [f"tasks.{name}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
            raise ValueError("; ".join(lines)) from None
        for section, key in SHARED_BY_TASKS:
            if getattr(getattr(task, section), key) != getattr(getattr(self, section), key):
                raise ValueError(
                    f"tasks.{name}.{section}.{key}: all tasks probe one encoder, which sees clips in one way; set it "
                    "for all of them, or use another file"
                )
        return task

    def with_seed(self, seed: int) -> "ProbeOptions":
        """The same with one of the seeds of `meta.seed`, in a folder of its own."""
        raw = merge(self.model_dump(), {"meta": {"seed": seed}, "folder": f"{self.folder}/seed-{seed}"})
        if raw["data"]["cache_features"] is True:
            raw["data"]["cache_features"] = f"{self.folder}/features"
        return type(self).model_validate(raw)
