"""Are the samples of a diffusion predictor like what is hidden? `python -m evals.main --fname <yaml>`.

For each held-out clip, a predictor pretrained with noised targets (`use_mask_tokens: false`) draws features of the
hidden tokens from those of the visible ones. The truth is the target encoder's features of the whole clip. If the draws
are calibrated, the truth is like one more of them: all its ranks are equally frequent, and the spread of the draws is
the error of their mean. Energy score and CRPS (lower is better) are compared with those of other clips' features at the
same positions (climatology), of the estimate from pure noise in a single step, averaged over the draws, and of a
predictor with mask tokens. A single prediction has the score of its error, without credit for a spread; `skill` is
therefore the improvement of samples over climatology, and of single predictions over the mean of climatology.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evals.predictor_calibration.measure import Measurement
from evals.predictor_calibration.pretraining import FeaturePrediction, RunConfig
from tubelet.config import RESUME_IGNORED, Config, ConfigError, dump
from tubelet.masks import MaskOptions
from tubelet.runtime.distributed import World
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.parallelize import DistributedConfig
from tubelet.runtime.watchdog import Watchdog


class SamplerConfig(Config):
    """A way to sample; see `VisionTransformerPredictor.sample`."""

    steps: int = Field(50, ge=1)
    """Denoising steps."""
    eta: float = Field(0.0, ge=0, le=1)
    """0: deterministic (DDIM), 1: ancestral (DDPM)."""

    @property
    def name(self) -> str:
        return f"eta {self.eta:g}, {self.steps} steps"


class DataConfig(Config):
    """YAML section `data`: held-out clips. Their size and frame rate are those of the pretraining."""

    datasets: list[str] = Field(min_length=1)
    """Folders, lists or files of videos."""
    num_clips: int = Field(128, ge=1)
    """Clips to measure, evenly spaced over the data; `draws` further ones are the climatology."""
    num_workers: Annotated[int, RESUME_IGNORED] = Field(2, ge=0)
    """Processes that read videos, for each process of the program; 0: read in the process itself."""
    worker_timeout: Annotated[int, RESUME_IGNORED] = Field(300, ge=0)
    """Seconds without a clip from a worker after which its video counts as unreadable; 0: no limit."""
    cache: Annotated[str | None, RESUME_IGNORED] = None
    """Folder for decoded videos, for small sets of short videos."""


class Options(Config):
    eval_name: Literal["predictor_calibration"]
    folder: str
    """Folder of the results."""
    pretrain: RunConfig
    """Run whose predictor has noised targets."""
    mask_tokens: RunConfig | None = None
    """Run with mask tokens on clips of the same size, for comparison. Its scores are comparable where the targets are
    the same, as of two runs of `salt` with one teacher; otherwise compare `skill`."""
    data: DataConfig
    mask: list[MaskOptions] | None = None
    """What is hidden; null: as in the pretraining."""
    draws: int = Field(39, ge=2)
    """Samples for each clip. With 39 exactly 80 % of the ranks are central."""
    samplers: list[SamplerConfig] = Field([SamplerConfig(), SamplerConfig(eta=1.0)], min_length=1)
    directions: int = Field(16, ge=1)
    """Random directions on which features are projected for ranks and CRPS."""
    coverage: float = Field(0.8, gt=0, lt=1)
    """Fraction of the draws between whose limits the truth is expected."""
    seed: int = Field(0, ge=0)
    """Seed of masks and samples."""
    distributed: Annotated[DistributedConfig, RESUME_IGNORED] = DistributedConfig()

    @model_validator(mode="after")
    def _check_names(self) -> "Options":
        if len({sampler.name for sampler in self.samplers}) < len(self.samplers):
            raise ValueError("samplers: two entries are the same; remove one")
        return self


def main(options: Options, world: World) -> None:
    """Write `results.json` and `calibration.png` into the folder. The processes share the clips."""
    model, reference = load(options, world)
    with Watchdog(world, options.distributed.timeout) as watchdog:
        results = Measurement(options, model, reference, watchdog).run()
    if world.is_main:
        from tubelet.generation import calibration_figure  # matplotlib takes a second to import
        from tubelet.report.figures import to_png

        folder = Path(options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "config.yaml", dump(options))
        write_json(folder / "results.json", results)
        (folder / "calibration.png").write_bytes(to_png(calibration_figure.draw(results["samplers"])))


def load(options: Options, world: World) -> tuple[FeaturePrediction, FeaturePrediction | None]:
    """Load the runs of `pretrain` and `mask_tokens`. Raises ConfigError where they cannot be measured or compared."""
    model = FeaturePrediction(options.pretrain, "pretrain", world.device)
    if model.predictor.use_mask_tokens:
        raise ConfigError(
            "pretrain.folder: its predictor has mask tokens, so that it makes one prediction; name a run with "
            "objective.predictor.use_mask_tokens=false, and this one in mask_tokens.folder"
        )
    for sampler in options.samplers:
        if sampler.steps > model.predictor.noise_steps:
            raise ConfigError(
                f"samplers: {sampler.steps} steps, but the predictor was trained with noise_steps "
                f"{model.predictor.noise_steps}; take at most as many"
            )
    if options.mask_tokens is None:
        return model, None
    reference = FeaturePrediction(options.mask_tokens, "mask_tokens", world.device)
    if not reference.predictor.use_mask_tokens:
        raise ConfigError("mask_tokens.folder: its predictor has noised targets; name a run with mask tokens")
    theirs, ours = reference.run.data.clip_shape, model.run.data.clip_shape
    if theirs != ours:
        raise ConfigError(f"mask_tokens.folder was pretrained on clips of another size: {theirs} instead of {ours}")
    known, needed = len(reference.predictor.mask_tokens), len(options.mask or model.run.mask)
    if known < needed:
        raise ConfigError(
            f"mask_tokens.folder has {known} mask token(s), fewer than there are masks ({needed}); shorten `mask`"
        )
    return model, reference
