"""Distance of the distributions of predicted and true futures, in the features of a frozen encoder."""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from app.generation.options import Options
from tubelet.config import ConfigError
from tubelet.generation.frechet import FeatureMoments, frechet_distance
from tubelet.probing import encoder as probed
from tubelet.runtime.distributed import World

TRUTH, HALVES = "truth", ("even", "odd")


class FeatureDistances:
    """Fréchet distances of the mean features of the frames ahead.

    Args:
        options: `evaluation.features` is the encoder.
        names: Forecasts to compare with the truth.
        world: The processes that share the clips.

    Raises:
        ConfigError: The encoder cannot be loaded, or does not take as many frames as are predicted.
    """

    def __init__(self, options: Options, names: Sequence[str], world: World):
        pretrain = options.evaluation.features
        assert pretrain is not None
        frames, side = options.num_predicted(), options.data.crop_size
        self.world, self.pretrain = world, pretrain
        try:
            encoder = probed.read_encoder(pretrain, frames, side, section="evaluation.features")
            encoder.grid_size(frames, options.data.clip.height, options.data.clip.width)
        except ValueError as error:
            raise ConfigError(f"evaluation.features: {frames} frames of {side} pixels: {error}") from None
        self.encoder = encoder.to(world.device).eval().requires_grad_(False)
        default = {
            "normalize_mean": [options.data.normalize_mean] * 3,
            "normalize_std": [options.data.normalize_std] * 3,
        }
        normalization = default | probed.normalization(pretrain, "evaluation.features")
        self.mean, self.std = (
            torch.tensor(values, device=world.device).view(3, 1, 1, 1) for values in normalization.values()
        )
        self.moments = {name: FeatureMoments(encoder.embed_dim) for name in (TRUTH, *HALVES, *names)}

    def update(self, name: str, frames: Tensor) -> None:
        """Add the futures [B, C, T, H, W] of a forecast."""
        self.moments[name].update(self._features(frames))

    def update_truth(self, frames: Tensor) -> None:
        """Add true futures. Two halves of them tell how large the distance of equal distributions is."""
        features = self._features(frames)
        for name, part in ((TRUTH, features), ("even", features[::2]), ("odd", features[1::2])):
            self.moments[name].update(part)

    def compute(self) -> dict[str, Any]:
        """Return the distance of each forecast to the truth, and that of two halves of the true clips."""
        for moments in self.moments.values():
            moments.gather(self.world.sum, self.world.device)
        distances = {
            name: round(frechet_distance(self.moments[TRUTH], moments), 6)
            for name, moments in self.moments.items()
            if name not in (TRUTH, *HALVES)
        }
        halves = round(frechet_distance(*(self.moments[name] for name in HALVES)), 6)
        encoder = json.loads(self.pretrain.model_dump_json(exclude_defaults=True))
        return {"encoder": encoder, "halves_of_truth": halves, **distances}

    @torch.no_grad()
    def _features(self, frames: Tensor) -> Tensor:
        """Return the mean of the tokens [B, D]."""
        colors = frames.clamp(0, 1).expand(-1, 3, -1, -1, -1)
        return self.encoder((colors - self.mean) / self.std).mean(1)
