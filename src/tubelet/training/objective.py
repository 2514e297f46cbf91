"""The contract between what is learned (an `Objective`) and how it is trained (the `Trainer`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.config import Config
from tubelet.data import Batch, ViewOptions
from tubelet.runtime.seeds import seed_for


class ObjectiveOptions(Config):
    """Base class of the options of an objective: YAML section `objective`."""

    name: str
    """File in tubelet/objectives, or an importable module such as `my_package.my_objective`."""

    def data_views(self) -> Mapping[str, ViewOptions]:
        """Return the views of each clip that the objective needs, by name; {} for the view `clip` alone."""
        return {}

    def check_batch(self, num_clips: int) -> None:
        """Raise ValueError where the loss needs more than `num_clips` clips at once, over all processes."""


@dataclass(frozen=True)
class StepRng:
    """Seeds of one training step: a pure function of the run's seed, the step, the clip and the purpose.

    The same clip gets the same seed for any number of processes and any number of accumulation steps.

    Args:
        seed: Seed of the run.
        step: Steps taken before this one.
        first_sample: Position of the batch's first sample in the global batch.
    """

    seed: int
    step: int
    first_sample: int

    def clip_seeds(self, batch: Batch, purpose: str, view: str = "clip") -> list[int]:
        """Return one seed for each clip of a view of the batch."""
        rows = len(batch.views[view])
        first = self.first_sample * (rows // len(batch))
        return [seed_for(self.seed, self.step, first + row, purpose) for row in range(rows)]

    def skip(self, samples: int) -> StepRng:
        """Return the seeds of the samples that follow the first `samples` ones."""
        return replace(self, first_sample=self.first_sample + samples)


class Objective(nn.Module):
    """Base class of all objectives: modules, loss, and what happens after an update.

    An objective knows nothing of devices, processes, precision, logging or files. The Trainer moves it to the device,
    replicates or shards it, runs it under autocast and stores its `parts` in checkpoints.
    """

    fixed_targets: bool = False
    """Whether the loss compares with labels, pixels or the features of a frozen network, so that the encoder cannot
    lower it by giving up information; see `tubelet.training.collapse`."""

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute the losses of a batch on the device.

        Args:
            batch: Views (uint8), targets and masks, see `tubelet.data.Batch`.
            rng: Seeds for everything random in the loss.

        Returns:
            `loss`, the scalar to minimise, averaged over the batch, and further detached scalars for the log.
        """
        raise NotImplementedError

    def prepare_batch(self, batch: Batch, rng: StepRng) -> Batch:
        """Transform the local batch before it is split for gradient accumulation, e.g. MixUp."""
        return batch

    def on_update(self, step: int) -> dict[str, float]:
        """Run after the optimizer step number `step` (from 0), e.g. the EMA of a target encoder.

        Returns:
            Numbers for the log.
        """
        return {}

    def parts(self) -> dict[str, nn.Module]:
        """Return the modules that a checkpoint stores, by name. FSDP shards each of them."""
        return dict(self.named_children())

    def trained_parts(self) -> dict[str, nn.Module]:
        """Return those of `parts` that the optimizer updates; gradients may be clipped for each of them."""
        return {name: part for name, part in self.parts().items() if any(p.requires_grad for p in part.parameters())}

    def lr_scales(self) -> Mapping[nn.Parameter, float]:
        """Return the factors on the learning rate of single parameters; 1 for all others."""
        return MappingProxyType({})

    def encoders(self) -> dict[str, nn.Module]:
        """Return the encoders among `parts`, by the same names, the one to evaluate first.

        `hub` and probes load that one unless `checkpoint_key` names another; feature statistics are computed on it.
        """
        return {}

    def metadata(self) -> dict[str, Any]:
        """Return what else a checkpoint stores, as JSON types."""
        return {}

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        """Raise CheckpointError where a checkpoint with this metadata cannot be continued."""


def ema_update(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """Set average <- momentum * average + (1 - momentum) * module, parameter by parameter, in fp32.

    Works on the local shards of sharded parameters.
    """
    from tubelet.runtime.parallelize import local_shard  # here, as it imports much that options do not need

    def local_shards(m: nn.Module) -> list[Tensor]:
        return [local_shard(p.data) for p in m.parameters()]

    with torch.no_grad():
        torch._foreach_lerp_(local_shards(average), local_shards(module), 1.0 - momentum)
