"""Options that all programs that train have in common."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from tubelet.config import RESUME_IGNORED, Config
from tubelet.runtime.attention_kernels import AttentionKernel
from tubelet.runtime.parallelize import DistributedConfig
from tubelet.runtime.precision import Precision, resolve
from tubelet.training.schedules import OptimizationConfig


class MetaConfig(Config):
    """YAML section `meta`."""

    seed: int = Field(0, ge=0)
    """Seed of the initial weights, the order of samples, the augmentation and the masks."""
    dtype: Annotated[Precision, RESUME_IGNORED] = "bfloat16"
    """Precision of autocast; float16 losses are scaled. `auto` is bfloat16 where the device has instructions for it,
    float32 elsewhere, e.g. on CPUs without AVX-512 BF16, where emulated bfloat16 is several times slower.
    A run is continued in the type that it was begun with."""
    compile: bool = False
    """Compile the transformer blocks with torch.compile."""
    tf32: bool = True
    """Round the factors of float32 matrix products on GPUs to TF32, with 10 bits of mantissa; sums stay float32."""
    attention: Annotated[AttentionKernel, RESUME_IGNORED] = "flash"
    """Attention kernel that is preferred on CUDA; flash, efficient and math follow where it cannot run. `cudnn`, which
    torch prefers on H100, plans for each new length of the sequences; `auto` leaves the choice to torch."""
    deterministic: Annotated[bool, RESUME_IGNORED] = False
    """Use only deterministic algorithms, so that runs on a GPU are equal bit for bit; see docs/reproducibility.md."""
    load_checkpoint: Annotated[bool, RESUME_IGNORED] = True
    """Continue the run in the folder; false: refuse a folder that holds a run."""


class LoggingConfig(Config):
    """YAML section `logging`."""

    log_every: int = Field(10, ge=1)
    """Steps between two reads from the device; the log has a line for each step all the same."""
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = ["tensorboard"]
    """Where metrics go besides log.jsonl."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Steps between two checkpoints, in addition to those by time; null: by time only."""
    checkpoint_every_minutes: float = Field(10, gt=0)
    """Minutes between two checkpoints."""
    keep_checkpoints: int = Field(3, ge=1)
    """Number of checkpoints that are kept, the newest ones."""
    milestones: list[int] = []
    """Steps after which a checkpoint is saved and kept besides, e.g. to probe the encoder as it was then."""
    monitor_every: int = Field(500, ge=1)
    """Steps between two evaluations on the monitored clips: statistics of the features in pretraining, accuracy in
    supervised training, error in frame prediction."""
    stop_on_collapse: bool = False
    """Stop a pretraining whose features collapse, after a checkpoint; false: warn only."""
    monitor_clips: int = Field(256, ge=0)
    """Number of monitored clips; 0 for none."""
    max_nonfinite: int = Field(20, ge=1)
    """The run stops when this many of the last 100 updates were skipped because loss or gradients were not finite."""


class TrainingOptions(Config):
    """Options of a program that trains."""

    app: str
    folder: Annotated[str, RESUME_IGNORED]
    """Run folder: configuration, log, checkpoints and results."""
    optimization: OptimizationConfig
    distributed: Annotated[DistributedConfig, RESUME_IGNORED] = DistributedConfig()
    meta: MetaConfig = MetaConfig()
    logging: Annotated[LoggingConfig, RESUME_IGNORED] = LoggingConfig()

    def dtype_on(self, device: torch.device) -> torch.dtype:
        """Return the type of forward passes on `device`."""
        return resolve(self.meta.dtype, device)
