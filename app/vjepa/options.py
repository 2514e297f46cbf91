"""Options of self-supervised pretraining. V-JEPA's flat keys are accepted, too; see `tubelet.config.aliases`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from tubelet import config, objectives
from tubelet.config import RESUME_IGNORED, ConfigError
from tubelet.config.registry import Module
from tubelet.data import AugConfig, DataConfig
from tubelet.data.transforms import MultiViewTransform, TrainTransform
from tubelet.masks import MaskCollator, MaskOptions, build_collator
from tubelet.models import EncoderOptions, check_returns_tokens
from tubelet.objectives import Setup
from tubelet.training import schedules
from tubelet.training.objective import ObjectiveOptions
from tubelet.training.options import TrainingOptions
from tubelet.training.schedules import NotNegative, Positive, Schedule

NOT_STAGES = ("", "..", "checkpoints", "report", "tensorboard", "bad_files.txt", "config.yaml", "git.txt", "log.jsonl")
"""Names that are no new folder in the folder of a run."""


class OptimizationConfig(schedules.OptimizationConfig):
    """YAML section `optimization`; the defaults are those of V-JEPA."""

    epochs: int = Field(300, ge=1)
    """Epochs of the run, of `ipe` steps each."""
    ipe: int | None = Field(None, ge=1)
    """Iterations (steps) per epoch; null: as many as see each clip once."""
    ipe_scale: float = Field(1.25, ge=1)
    """Factor on the length of the schedules; above 1 training ends before they do."""
    lr: Positive = 6.25e-4
    start_lr: NotNegative = 2e-4
    final_lr: NotNegative = 1e-6
    warmup: NotNegative = 40
    weight_decay: NotNegative = 0.04
    final_weight_decay: NotNegative | None = 0.4
    clip_grad: float | None = Field(10.0, gt=0)
    clip_start_epoch: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _check_warmup(self) -> "OptimizationConfig":
        self.check_warmup(self.epochs)
        return self

    def schedule(self, steps_per_epoch: int) -> Schedule:
        """Return the schedule of a run whose epochs have `steps_per_epoch` steps where `ipe` is null."""
        steps_per_epoch = self.ipe or steps_per_epoch
        return Schedule(self, self.epochs * steps_per_epoch, steps_per_epoch, self.ipe_scale)


class Options(TrainingOptions):
    """A pretraining run."""

    app: Literal["vjepa"] = "vjepa"
    objective: Annotated[ObjectiveOptions, Module("objectives", default="vjepa")] = Field({}, validate_default=True)
    """What is learned."""
    encoder: EncoderOptions = Field({}, validate_default=True)
    """The encoder that is pretrained."""
    mask: list[MaskOptions] = []
    """Masks; what the encoder sees (context) and what is predicted (target)."""
    data: DataConfig
    data_aug: AugConfig = AugConfig()
    optimization: OptimizationConfig = OptimizationConfig()
    init_from: Annotated[str | None, RESUME_IGNORED] = None
    """Run folder or checkpoint whose weights a new run starts from (continued pretraining). Clips may have another
    size there: positions are computed for the new one."""
    stages: Annotated[list[dict[str, Any]], RESUME_IGNORED] = []
    """Further stages of training, such as longer and larger clips at the end: `{name: …}` and the options that differ
    from those of this file. A stage is a run in `<folder>/<name>`, with schedules of its own, that starts from the
    weights of the stage before it."""

    @model_validator(mode="after")
    def _check_parts(self) -> "Options":
        """Build the objective without memory for its weights, so that misfits are errors before any data is read."""
        self.optimization.check_accumulation(self.data.batch_size)
        check_returns_tokens(self.encoder, "encoder")
        self.transform()
        with torch.device("meta"):
            objectives.build(self.objective, self.setup(schedule_steps=1))
        self.mask_collator()
        self.runs()
        return self

    def runs(self) -> list["Options"]:
        """Return the options of this run and of its further stages, in order. Raises ConfigError for invalid ones."""
        common = self.model_dump(exclude={"stages"}, exclude_unset=True)
        runs = [self]
        for index, stage in enumerate(self.stages):
            name = stage.get("name")
            if not isinstance(name, str) or name in NOT_STAGES or Path(name).name != name:
                raise ConfigError(f"  stages.{index}.name: {name!r}: give the name of a new folder in the run folder")
            if reserved := sorted(stage.keys() & {"app", "folder", "init_from", "stages"}):
                raise ConfigError(f"  stages.{index}.{reserved[0]}: a stage does not have this key; remove it")
            changes = {key: value for key, value in stage.items() if key != "name"}
            changes |= {"folder": f"{self.folder}/{name}", "init_from": runs[-1].folder}
            runs.append(config.check_part(config.merge(common, changes), Options, f"stages.{index}"))
        if len({run.folder for run in runs}) < len(runs):
            raise ConfigError("  stages: two stages have the same name")
        return runs

    def transform(self) -> TrainTransform | MultiViewTransform:
        """Return the transform of the training clips. Raises ConfigError or ValueError for impossible options."""
        views = self.objective.data_views()
        if views:
            return MultiViewTransform(self.data_aug, self.data.crop_size, views)
        return TrainTransform(self.data_aug, self.data.crop_size)

    def setup(self, schedule_steps: float) -> Setup:
        """Return what the objective is built from."""
        aug = self.data_aug
        data, masks = self.data, self._clip_masks()
        return Setup(
            self.encoder,
            data.clip_shape,
            masks,
            aug.normalize_mean,
            aug.normalize_std,
            schedule_steps,
            data.sound_shape,
        )

    def mask_collator(self) -> MaskCollator | None:
        """Return the collator that draws all masks: those of `mask`, then those of the objective's other views.

        Returns:
            None without masks.

        Raises:
            ValueError: A mask is impossible.
        """
        masks = self._clip_masks()
        further = objectives.further_masks(self.objective, self.setup(schedule_steps=1))
        return masks if masks is None else MaskCollator([*masks.samplers, *further])

    def _clip_masks(self) -> MaskCollator | None:
        return build_collator(self.mask, self.data.clip_shape) if self.mask else None

    def check_batch_size(self, processes: int) -> None:
        """Raise ConfigError where so many processes see too few clips at once for the loss or for the masks."""
        clips = self.data.batch_size * self.data.num_clips // self.optimization.accumulation_steps * processes
        try:
            self.objective.check_batch(clips)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        together, batch = self.data.mask_batch_size, self.data.batch_size * processes
        if together is not None and batch % together:
            raise ConfigError(
                f"data.mask_batch_size: {together} does not divide the {batch} samples of {processes} process(es) with "
                f"data.batch_size {self.data.batch_size}; take a multiple of {self.data.batch_size} that does, or null"
            )
