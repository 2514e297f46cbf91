"""VideoMAE: reconstruct the normalized pixels of hidden tubes (Tong et al. 2022, arXiv:2203.12602)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from pydantic import Field, field_validator
from torch import Tensor, nn

from tubelet.data import Batch, to_float
from tubelet.grid import ClipShape, as_pair
from tubelet.models import PredictorOptions
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.objectives import Setup
from tubelet.objectives.losses.hidden_features import predict, take_tokens
from tubelet.training.objective import Objective, ObjectiveOptions, StepRng


class Options(ObjectiveOptions):
    """YAML section `objective` with `name: videomae`."""

    name: str = "videomae"
    decoder: PredictorOptions = Field({}, validate_default=True)
    """Transformer over the visible tokens and one mask token for each hidden one; by default with 4 blocks."""
    normalize_targets: bool = True
    """Standardize the pixels of each patch in each channel (section 3.3); false: predict the pixels themselves."""

    @field_validator("decoder", mode="before")
    @classmethod
    def _light_decoder(cls, decoder: Any) -> Any:
        """Fill in what the paper's decoder has in place of the defaults of a predictor."""
        light = {"depth": 4, "zero_init_mask_tokens": False}
        return {**light, **decoder} if isinstance(decoder, dict) else decoder


class VideoMAE(Objective):
    """Encodes the visible tokens and predicts the pixels of the hidden ones.

    Args:
        encoder: Any encoder that accepts masks.
        decoder: Maps `(context, None, masks_context, masks_target, mask_index)` to `patch_size ** 2 * tubelet_size * 3`
            values at the target positions.
        clip: Size of the clips and tubelets.
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
        normalize_targets: See `Options`.
    """

    fixed_targets = True

    def __init__(
        self,
        encoder: Encoder,
        decoder: Predictor,
        clip: ClipShape,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        normalize_targets: bool = True,
    ):
        super().__init__()
        self.encoder, self.decoder, self.clip = encoder, decoder, clip
        self.mean, self.std, self.normalize_targets = mean, std, normalize_targets

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Mean squared error at the hidden positions of each mask, averaged over the masks."""
        clips = to_float(batch.clips, self.mean, self.std)
        pixels = self.targets(batch.clips)
        contexts = self.encoder(clips, list(batch.masks_context))
        predictions = predict(self.decoder, contexts, None, batch, rng)
        errors = [
            (predicted.float() - take_tokens(pixels, mask)).square().mean()
            for predicted, mask in zip(predictions, batch.masks_target, strict=True)
        ]
        return {"loss": torch.stack(errors).mean(0)}

    @torch.no_grad()
    def targets(self, clips: Tensor) -> Tensor:
        """Return the pixels of each token: uint8 clips [B, C, T, H, W] -> [B, N, tubelet_size * patch_size ** 2 * C].

        With `normalize_targets` the values of a token have mean 0 and (unbiased) standard deviation 1 in each channel.
        """
        video, s, (p, q) = clips.float() / 255, self.clip.tubelet_size, as_pair(self.clip.patch_size)
        patches = rearrange(video, "B C (t s) (h p) (w q) -> B (t h w) (s p q) C", s=s, p=p, q=q)
        if self.normalize_targets:
            mean, var = patches.mean(2, keepdim=True), patches.var(2, keepdim=True)
            patches = (patches - mean) / (var.sqrt() + 1e-6)
        return patches.flatten(2)

    def encoders(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder}


def build(options: Options, setup: Setup) -> VideoMAE:
    """Build encoder and decoder. Raises ValueError where they do not fit the clips or the masks."""
    num_masks = setup.num_masks(at_least=1)
    encoder = setup.build_encoder(drop_tokens=True)
    clip = setup.clip
    out_dim = 3 * clip.tubelet_size * math.prod(as_pair(clip.patch_size))
    decoder = setup.build_predictor(options.decoder, encoder, num_masks, key="objective.decoder", out_dim=out_dim)
    return VideoMAE(encoder, decoder, clip, mean=setup.mean, std=setup.std, normalize_targets=options.normalize_targets)
