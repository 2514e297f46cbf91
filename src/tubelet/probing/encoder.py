"""The frozen encoder of a probe."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from tubelet import hub
from tubelet.config import Config, ConfigError, check
from tubelet.data import AugConfig, to_float
from tubelet.models import ModelConfig, build_encoder
from tubelet.probing.options import RANDOM, PretrainConfig, ProbeOptions
from tubelet.runtime.seeds import seed_for

Labelled = TypeVar("Labelled", bound=Config)


def with_normalization(options: Labelled) -> Labelled:
    """The options of a probe or of supervised training with every colour's mean and standard deviation filled in.

    What `data` leaves open is the pretraining's own where its file says it, else ImageNet's; `data_aug` gets the same.
    """
    values = options.data.normalization()
    if None in values.values():
        read = options.pretrain is not None and not _is_drawn_from_yaml(options.pretrain)
        own = AugConfig().model_dump() | (hub.read(_path(options.pretrain)).normalization() if read else {})
        values = {name: own[name] if value is None else value for name, value in values.items()}
    changed = {"data": options.data.model_copy(update=values)}
    if options.data_aug is not None:
        changed["data_aug"] = options.data_aug.model_copy(update=values)
    return options.model_copy(update=changed)


class FrozenEncoder:
    """uint8 clips to tokens, without gradients, dropout or augmentation of weights.

    options: as they come from `with_normalization`.
    """

    def __init__(self, options: ProbeOptions, device: torch.device):
        self.device = device
        self.dtype = torch.bfloat16 if options.optimization.use_bfloat16 else torch.float32
        self.mean, self.std = options.data.normalize_mean, options.data.normalize_std
        frames, side = options.data.frames_per_clip, options.optimization.resolution
        self.module = load(options.pretrain, frames, side).to(device).eval().requires_grad_(False)
        self.fingerprint = fingerprint(self.module)

    @torch.no_grad()  # not inference_mode: heads save these tokens for their backward pass
    def __call__(self, clips: Tensor) -> Tensor:
        """uint8 clips [B, n, C, T, H, W] -> tokens [B, n, N, D] on the device."""
        x = to_float(clips.to(self.device, non_blocking=True).flatten(0, 1), self.mean, self.std)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = self.module(x)
        return rearrange(tokens.to(self.dtype), "(B n) N D -> B n N D", B=len(clips))


def load(pretrain: PretrainConfig, frames: int, side: int) -> nn.Module:
    """The encoder that `pretrain` names, on the CPU; ConfigError where it is missing or does not fit the clips."""
    try:
        if pretrain.checkpoint == RANDOM:
            encoder = random_encoder(pretrain, side, frames)
        else:
            encoder = hub.load_encoder(_path(pretrain), pretrain.checkpoint_key, **_given(pretrain))
    except ValueError as error:
        raise _misfit("", frames, side, error) from None
    check_clip_size(encoder, frames, side)
    return encoder


def check_clip_size(encoder: nn.Module, frames: int, side: int, task: str = "") -> None:
    """Raises ConfigError where clips of the sizes of `data` and `optimization` (of `task`) cannot be encoded."""
    try:
        encoder.grid_size(frames, side, side)
    except ValueError as error:
        raise _misfit(f"tasks.{task}: " if task else "", frames, side, error) from None


def _misfit(at: str, frames: int, side: int, error: ValueError) -> ConfigError:
    return ConfigError(f"{at}data.frames_per_clip {frames}, optimization.resolution {side}: {error}")


def random_encoder(pretrain: PretrainConfig, resolution: int, frames: int) -> nn.Module:
    """An encoder of the architecture in `pretrain`, else of the run in its folder, whose weights are only drawn.

    Built for clips of `resolution` and `frames` where neither says for which.
    """
    given = _given(pretrain)
    if pretrain.init_std is not None:
        given["init_std"] = pretrain.init_std
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(pretrain.init_seed, "random encoder"))
        if not _is_drawn_from_yaml(pretrain):
            return hub.read(_path(pretrain)).build_encoder(given)
        sizes = {"img_size": resolution, "num_frames": frames, "patch_size": 16, "tubelet_size": 2}
        sizes = {name: given.pop(name, size) for name, size in sizes.items()}
        return build_encoder(check(given, ModelConfig, "pretrain"), crop_size=sizes.pop("img_size"), **sizes)


def _is_drawn_from_yaml(pretrain: PretrainConfig) -> bool:
    """Whether the YAML itself says the architecture of a random encoder, so that no file is read."""
    return pretrain.checkpoint == RANDOM and pretrain.model_name is not None


def _path(pretrain: PretrainConfig) -> Path:
    path = Path(pretrain.folder)
    if not path.exists():
        raise ConfigError(f"pretrain.folder: {path} does not exist; give the folder of a pretraining run or of weights")
    if pretrain.checkpoint not in (None, RANDOM):
        path = path / pretrain.checkpoint
    if not path.exists():
        raise ConfigError(f"pretrain.checkpoint: {path} does not exist; leave it out for the newest of a run")
    return path


def fingerprint(module: nn.Module) -> str:
    """A hash of class, weights and, of each encoder in it, the options: they shape the output without being weights."""
    digest = hashlib.sha256(repr(module).encode())
    for part in module.modules():
        if hasattr(part, "built_from"):
            digest.update(json.dumps(part.built_from, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _given(pretrain: PretrainConfig) -> dict[str, Any]:
    """The architecture as far as the YAML says it, in the names of `hub.load_encoder`."""
    names = {"resolution": "img_size", "frames_per_clip": "num_frames"}
    names |= {name: name for name in ("encoder", "model_name", "encoder_args", "patch_size", "tubelet_size")}
    names |= {name: name for name in ("uniform_power", "use_rope", "rope_pairing", "use_silu", "wide_silu")}
    names |= {"use_activation_checkpointing": "use_activation_checkpointing"}
    return {theirs: value for ours, theirs in names.items() if (value := getattr(pretrain, ours)) is not None}
