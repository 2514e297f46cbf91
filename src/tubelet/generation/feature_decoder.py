"""What a pretrained V-JEPA imagines: its predictor's features of frames to come, made visible by a pixel decoder.

Encoder and predictor stay as they were pretrained; only the decoder learns. It sees nothing but the features at the
hidden places (as in section 5 of Bardes et al. 2024), so whatever it paints was in them.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from pydantic import Field
from torch import Tensor, nn

from tubelet import hub
from tubelet.config import Config, ConfigError
from tubelet.layers import Block
from tubelet.layers.init import init_weights
from tubelet.layers.positions import Grid, Positions
from tubelet.runtime.seeds import generator


class PretrainConfig(Config):
    """YAML section `pretrain`: the run of `app.vjepa` that imagines."""

    folder: str
    checkpoint: str | None = None
    """File in the folder, such as `checkpoints/step-00001000.pt`; the newest if null."""
    mask_index: int = Field(0, ge=0)
    """Which of the predictor's mask tokens stands for the frames to come."""
    learn_from: Literal["predictions", "targets"] = "predictions"
    """What the decoder learns to read: the predictor's features, or the target encoder's features of the true frames,
    in the same places. The first gives the better pictures, the second shows the predictor's errors as they are."""
    sampling_steps: int = Field(10, ge=1)
    """Denoising steps of an answer, where the predictor noises its targets (model.use_mask_tokens: false)."""


class DecoderConfig(Config):
    """YAML section `decoder`: the size of the pixel decoder."""

    embed_dim: int = Field(192, ge=1)
    depth: int = Field(2, ge=0)
    num_heads: int = Field(3, ge=1)


class PixelDecoder(nn.Module):
    """Features of all places of a token grid [B, t*h*w, D] -> frames [B, C, T, H, W]: a small transformer."""

    def __init__(
        self, config: DecoderConfig, in_dim: int, grid: Grid, channels: int, patch_size: int, tubelet_size: int
    ):
        super().__init__()
        self.grid, self.patch_size, self.tubelet_size = grid, patch_size, tubelet_size
        self.embed = nn.Linear(in_dim, config.embed_dim)
        self.positions = Positions(config.embed_dim, config.num_heads, grid, uniform_power=True)
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(config.embed_dim, config.num_heads, qkv_bias=True, norm_layer=norm) for _ in range(config.depth)
        )
        self.norm = norm(config.embed_dim)
        self.to_pixels = nn.Linear(config.embed_dim, channels * tubelet_size * patch_size**2)
        init_weights(self, std=0.02)

    def forward(self, features: Tensor) -> Tensor:
        x = self.positions.add(self.embed(features))
        for block in self.blocks:
            x = block(x)
        t, h, w = self.grid
        s, p = self.tubelet_size, self.patch_size
        pixels = self.to_pixels(self.norm(x))
        return rearrange(pixels, "B (t h w) (C s p q) -> B C (t s) (h p) (w q)", t=t, h=h, w=w, s=s, p=p, q=p)


class FeatureDecoder(nn.Module):
    """Frames seen [B, C, T, H, W] with values from 0 to 1 -> the frames that the predictor imagines after them.

    `parts` holds the frozen `encoder`, `target_encoder` and `predictor`; `grid` is that of all frames together, of
    which the first `seen_slots` time slots are seen. `mean`, `std`: of each channel, as in the pretraining.
    """

    def __init__(
        self,
        parts: dict[str, nn.Module],
        decoder: PixelDecoder,
        config: PretrainConfig,
        *,
        grid: Grid,
        seen_slots: int,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        super().__init__()
        self.frozen = nn.ModuleDict(parts).requires_grad_(False)
        self.decoder, self.config = decoder, config
        t, h, w = grid
        self.is_stochastic = not parts["predictor"].use_mask_tokens
        self.hidden_slots = t - seen_slots
        places = torch.arange(t * h * w)
        self.register_buffer("seen_places", places[: seen_slots * h * w], persistent=False)
        self.register_buffer("hidden_places", places[seen_slots * h * w :], persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1, 1), persistent=False)
        self.train()

    def train(self, mode: bool = True) -> "FeatureDecoder":
        """As for any module, but what is frozen never drops anything out."""
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, seen: Tensor, future: Tensor | None = None, draw: int | None = None) -> Tensor:
        """The frames imagined. `draw` chooses among the answers of a predictor that noises its targets; None: any.

        With the true `future` [B, C, horizon, H, W], what the decoder makes of what it learns from.
        """
        if future is None or self.config.learn_from == "predictions":
            return self.decoder(self.imagine(seen, draw))
        return self.decoder(self.remember(torch.cat([seen, future], dim=2)))

    @torch.no_grad()
    def imagine(self, seen: Tensor, draw: int | None = None) -> Tensor:
        """Predicted features at the hidden places [B, K, D]."""
        masks_seen, masks_hidden = (
            repeat(places, "K -> B K", B=len(seen)) for places in (self.seen_places, self.hidden_places)
        )
        # The encoder drops what is not seen; only its shape matters.
        tubelet_size = self.decoder.tubelet_size
        unseen = self._normalised(seen)[:, :, :1].expand(-1, -1, self.hidden_slots * tubelet_size, -1, -1)
        context = self.frozen["encoder"](torch.cat([self._normalised(seen), unseen], dim=2), masks_seen)
        predictor = self.frozen["predictor"]
        if predictor.use_mask_tokens:
            return predictor(context, None, masks_seen, masks_hidden, self.config.mask_index)
        noise = None if draw is None else generator("imagination", draw, device=seen.device)
        return predictor.sample(context, masks_seen, masks_hidden, self.config.sampling_steps, generator=noise)[0]

    @torch.no_grad()
    def remember(self, video: Tensor) -> Tensor:
        """The target encoder's features of the true frames at the hidden places [B, K, D], as in pretraining."""
        features = self.frozen["target_encoder"](self._normalised(video))
        return F.layer_norm(features, features.shape[-1:])[:, self.hidden_places]

    def trained(self) -> nn.Module:
        """What a checkpoint keeps."""
        return self.decoder

    def _normalised(self, video: Tensor) -> Tensor:
        return (video - self.mean) / self.std


def build_feature_decoder(
    pretrain: PretrainConfig, decoder: DecoderConfig, *, channels: int, sizes: dict[str, int], num_target_frames: int
) -> FeatureDecoder:
    """The pretrained parts with a new decoder.

    sizes: crop_size, num_frames (seen), patch_size, tubelet_size of the data. ConfigError where they are not the run's,
    or `pretrain.folder` holds no run of app.vjepa with a predictor.
    """
    path = Path(pretrain.folder) if pretrain.checkpoint is None else Path(pretrain.folder) / pretrain.checkpoint
    if not path.exists():
        raise ConfigError(f"pretrain: {path} does not exist; give a run of app.vjepa as pretrain.folder=…")
    weights = hub.read(path)
    if not isinstance(weights, hub.OwnWeights) or "predictor" not in weights.parts:
        raise ConfigError(f"pretrain.folder: {path} is no run of app.vjepa; only these say how they were pretrained")
    _check_same_sizes(path, weights.config["data"], sizes, num_target_frames)
    parts = {name: hub.load_encoder(path, name) for name in ("encoder", "target_encoder")}
    parts["predictor"] = hub.load_predictor(path)
    _check_options(pretrain, parts["predictor"])
    try:
        grid = parts["encoder"].grid_size(
            sizes["num_frames"] + num_target_frames, sizes["crop_size"], sizes["crop_size"]
        )
        pixels = PixelDecoder(
            decoder, parts["encoder"].embed_dim, (num_target_frames // sizes["tubelet_size"], *grid[1:]), channels,
            sizes["patch_size"], sizes["tubelet_size"],
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"decoder: {error}") from None
    augmentation = weights.config["data_aug"]
    return FeatureDecoder(
        parts,
        pixels,
        pretrain,
        grid=grid,
        seen_slots=sizes["num_frames"] // sizes["tubelet_size"],
        mean=augmentation["normalize_mean"],
        std=augmentation["normalize_std"],
    )


def _check_same_sizes(path: Path, run: dict[str, Any], sizes: dict[str, int], num_target_frames: int) -> None:
    wanted = {name: run[name] for name in ("crop_size", "patch_size", "tubelet_size")}
    wrong = [f"data.{name}={value} instead of {sizes[name]}" for name, value in wanted.items() if sizes[name] != value]
    if sizes["num_frames"] + num_target_frames != run["num_frames"]:
        wrong.append(
            f"data.num_frames and data.num_target_frames that make {run['num_frames']} together instead of "
            f"{sizes['num_frames']} + {num_target_frames}"
        )
    elif sizes["num_frames"] % run["tubelet_size"]:
        wrong.append(f"data.num_frames a multiple of {run['tubelet_size']} instead of {sizes['num_frames']}")
    if wrong:
        raise ConfigError(f"pretrain.folder: {path} was pretrained on other clips: set " + ", ".join(wrong))


def _check_options(pretrain: PretrainConfig, predictor: nn.Module) -> None:
    if predictor.use_mask_tokens and pretrain.mask_index >= len(predictor.mask_tokens):
        raise ConfigError(
            f"pretrain.mask_index: {pretrain.mask_index}, but the predictor has {len(predictor.mask_tokens)} mask "
            f"token(s); valid: 0 to {len(predictor.mask_tokens) - 1}"
        )
    if not predictor.use_mask_tokens and pretrain.sampling_steps > predictor.noise_steps:
        raise ConfigError(
            f"pretrain.sampling_steps: {pretrain.sampling_steps}, but the predictor's schedule has "
            f"{predictor.noise_steps} steps at most"
        )
