"""A pretraining run with encoder, predictor and the features that it predicts."""

from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor

from tubelet import hub, objectives
from tubelet.config import Config, ConfigError, check
from tubelet.config.registry import Module
from tubelet.config.translation import to_canonical
from tubelet.data import AugConfig, to_float
from tubelet.data import DataConfig as ClipsConfig
from tubelet.masks import MaskOptions, build_collator
from tubelet.models import EncoderOptions
from tubelet.objectives import Setup
from tubelet.runtime import checkpoint
from tubelet.training.objective import ObjectiveOptions


class RunConfig(Config):
    """YAML sections `pretrain` and `mask_tokens`."""

    folder: str
    """Run folder of app.vjepa, with an objective that predicts features: `vjepa` or `salt`."""
    checkpoint: str | None = None
    """Checkpoint in the folder, such as `checkpoints/step-00001000`; null: the newest."""


class Run(Config):
    """What is needed of the configuration of a pretraining."""

    model_config = pydantic.ConfigDict(extra="ignore")

    objective: Annotated[ObjectiveOptions, Module("objectives", default="vjepa")] = pydantic.Field(
        {}, validate_default=True
    )
    encoder: EncoderOptions
    mask: list[MaskOptions]
    data: ClipsConfig
    data_aug: AugConfig = AugConfig()


class FeaturePrediction:
    """Encoder, predictor and targets of a pretraining, frozen.

    Args:
        config: The run.
        section: Key of `config`, for messages.
        device: Device of the weights.

    Raises:
        ConfigError: There is no such run, or its objective does not predict features.
    """

    def __init__(self, config: RunConfig, section: str, device: torch.device):
        path = Path(config.folder) / (config.checkpoint or "")
        if not path.exists():
            raise ConfigError(f"{section}: {path} does not exist; set {section}.folder to a run folder of app.vjepa")
        weights = hub.read(path)
        if not isinstance(weights, hub.OwnWeights):
            raise ConfigError(f"{section}.folder: {path} is not a run of app.vjepa")
        self.run = check(to_canonical(weights.config, "vjepa"), Run, path)
        self.objective = self._build(section)
        self.objective.check_metadata(checkpoint.read_metadata(weights.path))
        for name, part in self.objective.parts().items():
            checkpoint.load_weights(part, weights.part(name), f"{name} of {path}")
        self.objective.to(device).eval().requires_grad_(False)

    def _build(self, section: str) -> Any:
        run, clip = self.run, self.run.data.clip_shape
        aug, masks = run.data_aug, build_collator(run.mask, clip)
        setup = Setup(run.encoder, clip, masks, aug.normalize_mean, aug.normalize_std, schedule_steps=1)
        objective: Any = objectives.build(run.objective, setup)
        if not (hasattr(objective, "predictor") and hasattr(objective, "targets")):
            raise ConfigError(
                f"{section}.folder: its objective, {run.objective.name}, does not predict features; vjepa and salt do"
            )
        return objective

    @property
    def predictor(self) -> Any:
        return self.objective.predictor

    def features(self, clip: Tensor) -> Tensor:
        """Return the true features [N, D] of all tokens of a clip, uint8 [1, C, T, H, W]."""
        tokens = torch.arange(self.run.data.clip_shape.grid.num_tokens, device=clip.device)
        (targets,) = self.objective.targets(self._normalized(clip), [tokens[None]])
        return targets[0].float()

    def context(self, clip: Tensor, seen: Tensor) -> Tensor:
        """Encode the seen tokens [1, Kc] of a clip: [1, Kc, D]."""
        return self.objective.encoder(self._normalized(clip), [seen])[0]

    def sample(
        self,
        context: Tensor,
        seen: Tensor,
        hidden: Tensor,
        steps: int,
        draws: int,
        generator: torch.Generator,
        eta: float = 0.0,
    ) -> Tensor:
        """Draw features [draws, Kt, D] of the hidden tokens [1, Kt], given the `context` of the seen ones [1, Kc]."""
        return self.predictor.sample(context, seen, hidden, steps, draws, generator, eta)[:, 0].float()

    def predict(self, context: Tensor, seen: Tensor, hidden: Tensor, mask_index: int) -> Tensor:
        """Predict the features [Kt, D] of the hidden tokens with mask tokens, likewise."""
        return self.predictor(context, None, seen, hidden, mask_index)[0].float()

    def _normalized(self, clip: Tensor) -> Tensor:
        return to_float(clip, self.run.data_aug.normalize_mean, self.run.data_aug.normalize_std)
