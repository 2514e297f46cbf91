"""Feature-to-pixel decoder: visualizes the features that a pretrained V-JEPA predicts for future frames.

Encoder and predictor are frozen; only the decoder is trained. Its input is restricted to the features of the masked
tokens (Bardes et al. 2024, section 5), so everything in the decoded frames comes from them.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from pydantic import Field
from torch import Tensor, nn

from tubelet import hub
from tubelet.config import RESUME_IGNORED, Config, ConfigError
from tubelet.grid import ClipShape, Grid, as_pair
from tubelet.layers import Block
from tubelet.layers.init import init_weights
from tubelet.layers.positions import Positions
from tubelet.runtime import checkpoint
from tubelet.runtime.seeds import torch_generator


class PretrainConfig(Config):
    """YAML section `pretrain`: the pretrained V-JEPA whose predictions are decoded."""

    folder: Annotated[str, RESUME_IGNORED]
    """Run folder of the pretraining."""
    checkpoint: Annotated[str | None, RESUME_IGNORED] = None
    """Checkpoint within the folder, such as `checkpoints/step-00001000`; null: the latest."""
    mask_index: int = Field(0, ge=0)
    """Index of the mask token that the predictor uses for future frames."""
    learn_from: Literal["predictions", "targets"] = "predictions"
    """Features on which the decoder is trained: those of the predictor, or those of the target encoder for the true
    frames. The former give better frames, the latter show the errors of the predictor more directly."""
    sampling_steps: int = Field(10, ge=1)
    """Denoising steps per sample, for a predictor with noised targets (use_mask_tokens: false)."""


class DecoderConfig(Config):
    """YAML section `decoder`: the size of the pixel decoder."""

    embed_dim: int = Field(192, ge=1)
    """Width of the decoder."""
    depth: int = Field(2, ge=0)
    """Number of transformer blocks."""
    num_heads: int = Field(3, ge=1)
    """Attention heads per block."""


class PixelDecoder(nn.Module):
    """Small transformer that decodes features [B, t*h*w, D] to frames [B, C, T, H, W].

    Args:
        config: Size of the decoder.
        in_dim: Width D of the features.
        grid: Token grid (t, h, w) of the features.
        channels: Number of output channels C.
        patch_size: Side of a patch in pixels, or (height, width).
        tubelet_size: Frames per token.
    """

    def __init__(
        self,
        config: DecoderConfig,
        in_dim: int,
        grid: Grid,
        channels: int,
        patch_size: int | tuple[int, int],
        tubelet_size: int,
    ):
        super().__init__()
        self.grid, self.patch_size, self.tubelet_size = grid, as_pair(patch_size), tubelet_size
        self.embed = nn.Linear(in_dim, config.embed_dim)
        self.positions = Positions(config.embed_dim, config.num_heads, grid, uniform_power=True)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads, qkv_bias=True, norm_layer=norm) for _ in range(config.depth)
        )
        self.norm = norm(config.embed_dim)
        self.to_pixels = nn.Linear(config.embed_dim, channels * tubelet_size * math.prod(self.patch_size))
        init_weights(self, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        x = self.positions.add(self.embed(features))
        for block in self.blocks:
            x = block(x)
        t, h, w = self.grid
        s, (p, q) = self.tubelet_size, self.patch_size
        pixels = self.to_pixels(self.norm(x))
        return rearrange(pixels, "B (t h w) (C s p q) -> B C (t s) (h p) (w q)", t=t, h=h, w=w, s=s, p=p, q=q)


class FeatureDecoder(nn.Module):
    """Predict future frames with a frozen V-JEPA and a trained pixel decoder.

    Args:
        parts: The pretrained `encoder`, `target_encoder` and `predictor`.
        decoder: Decoder of the predicted features.
        config: Options of the pretrained model.
        grid: Token grid (t, h, w) of input and future frames together.
        context_length: Number of temporal indices of the input; the remaining ones are predicted.
        mean: Mean of each channel, as in pretraining.
        std: Standard deviation of each channel, as in pretraining.
    """

    context_indices: Tensor
    target_indices: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        parts: dict[str, nn.Module],
        decoder: PixelDecoder,
        config: PretrainConfig,
        *,
        grid: Grid,
        context_length: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.frozen = nn.ModuleDict(parts).requires_grad_(False)
        self.decoder, self.config = decoder, config
        t, h, w = grid
        self.is_stochastic = not parts["predictor"].use_mask_tokens
        self.target_length = t - context_length
        indices = torch.arange(t * h * w)
        self.register_buffer("context_indices", indices[: context_length * h * w], persistent=False)
        self.register_buffer("target_indices", indices[context_length * h * w :], persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1, 1), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "FeatureDecoder":
        """Set the training mode; the frozen parts always stay in evaluation mode."""
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, seen: Tensor, future: Tensor | None = None, draw: int | None = None) -> Tensor:
        """Predict future frames.

        Args:
            seen: Input frames [B, C, T, H, W] with values from 0 to 1.
            future: True future frames [B, C, horizon, H, W]. Pass them in training: with `learn_from: targets` the
                decoder then reads the target features of these frames instead of the predicted features.
            draw: Index of the sample of a predictor with noised targets; a random sample if None.

        Returns:
            Frames [B, C, horizon, H, W].
        """
        if future is None or self.config.learn_from == "predictions":
            return self.decoder(self.predict_features(seen, draw))
        return self.decoder(self.encode(torch.cat([seen, future], dim=2)))

    @torch.no_grad()
    def predict_features(self, seen: Tensor, draw: int | None = None) -> Tensor:
        """Return the predicted features of the future tokens [B, K, D]; arguments as for `forward`."""
        masks_context, masks_target = (
            repeat(indices, "K -> B K", B=len(seen)) for indices in (self.context_indices, self.target_indices)
        )
        # The encoder drops the future tokens, so only the shape of these frames matters.
        num_future_frames = self.target_length * self.decoder.tubelet_size
        placeholder = self._normalize(seen)[:, :, :1].expand(-1, -1, num_future_frames, -1, -1)
        context = self.frozen["encoder"](torch.cat([self._normalize(seen), placeholder], dim=2), masks_context)
        predictor: Any = self.frozen["predictor"]
        if predictor.use_mask_tokens:
            return predictor(context, None, masks_context, masks_target, self.config.mask_index)
        # A different key would change the samples of existing runs.
        noise = None if draw is None else torch_generator("imagination", draw, device=seen.device)
        return predictor.sample(context, masks_context, masks_target, self.config.sampling_steps, generator=noise)[0]

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Return the target features of the future tokens [B, K, D] for complete clips, as in pretraining."""
        features = self.frozen["target_encoder"](self._normalize(video))
        return F.layer_norm(features, features.shape[-1:])[:, self.target_indices]

    def trained(self) -> nn.Module:
        """Return the module that is trained and saved in checkpoints."""
        return self.decoder

    def _normalize(self, video: Tensor) -> Tensor:
        return (video - self.mean) / self.std


def build_feature_decoder(
    pretrain: PretrainConfig, decoder: DecoderConfig, clip: ClipShape, *, channels: int, num_target_frames: int
) -> FeatureDecoder:
    """Load the parts of a pretrained V-JEPA and build a new decoder.

    Args:
        pretrain: The pretrained model.
        decoder: Size of the decoder.
        clip: Size of the input clips.
        channels: Number of channels of the frames.
        num_target_frames: Number of future frames to predict.

    Raises:
        ConfigError: If the sizes differ from those of pretraining, or the folder is not a V-JEPA pretraining run.
    """
    path = Path(pretrain.folder) if pretrain.checkpoint is None else Path(pretrain.folder) / pretrain.checkpoint
    if not path.exists() and not checkpoint.is_latest(path):
        raise ConfigError(f"pretrain: {path} does not exist; set pretrain.folder to a run folder of app.vjepa")
    weights = hub.read(path)
    if not isinstance(weights, hub.OwnWeights) or "predictor" not in weights.parts:
        raise ConfigError(f"pretrain.folder: {path} is not a run of app.vjepa with a predictor")
    _check_same_sizes(path, weights.config["data"], clip, num_target_frames)
    encoder, target_encoder = (weights.load_encoder(name) for name in ("encoder", "target_encoder"))
    predictor = weights.load_predictor()
    _check_options(pretrain, predictor)
    try:
        grid = encoder.grid_size(clip.num_frames + num_target_frames, clip.height, clip.width)
        pixels = PixelDecoder(
            decoder, encoder.embed_dim, grid._replace(t=num_target_frames // clip.tubelet_size), channels,
            clip.patch_size, clip.tubelet_size,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"decoder: {error}") from None
    normalization = weights.normalization()
    return FeatureDecoder(
        {"encoder": encoder, "target_encoder": target_encoder, "predictor": predictor},
        pixels,
        pretrain,
        grid=grid,
        context_length=clip.num_frames // clip.tubelet_size,
        mean=normalization["normalize_mean"],
        std=normalization["normalize_std"],
    )


def _check_same_sizes(path: Path, run: dict[str, Any], clip: ClipShape, num_target_frames: int) -> None:
    """Raise ConfigError if the clips differ from those of pretraining."""
    sizes = clip.as_dict()
    expected = {name: run[name] for name in ("crop_size", "patch_size", "tubelet_size")}
    fixes = [
        f"data.{name}={value} instead of {sizes[name]}" for name, value in expected.items() if sizes[name] != value
    ]
    if sizes["num_frames"] + num_target_frames != run["num_frames"]:
        fixes.append(
            f"data.num_frames + data.num_target_frames = {run['num_frames']} instead of "
            f"{sizes['num_frames']} + {num_target_frames}"
        )
    elif sizes["num_frames"] % run["tubelet_size"]:
        fixes.append(f"data.num_frames to a multiple of {run['tubelet_size']} instead of {sizes['num_frames']}")
    if fixes:
        raise ConfigError(f"pretrain.folder: {path} was pretrained on clips of another size: set " + ", ".join(fixes))


def _check_options(pretrain: PretrainConfig, predictor: Any) -> None:
    """Raise ConfigError if the predictor does not support the options."""
    if getattr(predictor, "levels", 1) > 1:
        raise ConfigError(
            f"pretrain.folder: the run predicts {predictor.levels} levels of features, and the decoder reads the last "
            "one only; take a run of vjepa, or of vjepa2_1 with objective.levels: 1"
        )
    if predictor.use_mask_tokens and pretrain.mask_index >= len(predictor.mask_tokens):
        raise ConfigError(
            f"pretrain.mask_index: {pretrain.mask_index}, but the predictor has {len(predictor.mask_tokens)} mask "
            f"token(s); choose a value from 0 to {len(predictor.mask_tokens) - 1}"
        )
    if not predictor.use_mask_tokens and pretrain.sampling_steps > predictor.noise_steps:
        raise ConfigError(
            f"pretrain.sampling_steps: {pretrain.sampling_steps}, but the noise schedule of the predictor has only "
            f"{predictor.noise_steps} steps"
        )
