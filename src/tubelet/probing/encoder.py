"""The frozen encoder of a probe."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from tubelet import hub
from tubelet.config import Config, ConfigError, Size
from tubelet.data import AugConfig, to_float
from tubelet.grid import ClipShape
from tubelet.models import build_encoder, drop_lacking_defaults
from tubelet.models.interfaces import Encoder
from tubelet.probing.data_options import ClipsConfig
from tubelet.probing.options import RANDOM, PretrainConfig
from tubelet.runtime import checkpoint
from tubelet.runtime.distributed import World
from tubelet.runtime.precision import autocast
from tubelet.runtime.seeds import seed_for


class _ClipOptions(Protocol):
    @property
    def data(self) -> ClipsConfig: ...

    @property
    def pretrain(self) -> PretrainConfig | None: ...

    def model_copy(self: "Options", *, update: Mapping[str, Any] | None = None) -> "Options": ...


Options = TypeVar("Options", bound=_ClipOptions)


def with_normalization(options: Options) -> Options:
    """The options of a program, with the mean and standard deviation of the colors filled in.

    Values that `data` leaves open are those of the pretraining where its file says them, otherwise ImageNet's. Given
    ones that differ from the pretraining's are warned of.
    `data_aug` gets the same, where the program has it.
    """
    values = options.data.normalization()
    given = {name: value for name, value in values.items() if value is not None}
    if given and options.pretrain is not None and not _needs_no_file(options.pretrain):
        hub.check_normalization(hub.read(_path(options.pretrain)), given, "data")
    if None in values.values():
        defaults = AugConfig().model_dump() | ({} if options.pretrain is None else normalization(options.pretrain))
        values = {name: defaults[name] if value is None else value for name, value in values.items()}
    changed: dict[str, Config] = {"data": options.data.model_copy(update=values)}
    augmentation: AugConfig | None = getattr(options, "data_aug", None)
    if augmentation is not None:
        changed["data_aug"] = augmentation.model_copy(update=values)
    return options.model_copy(update=changed)


def normalization(pretrain: PretrainConfig, section: str = "pretrain") -> dict[str, tuple[float, ...]]:
    """The `normalize_mean` and `normalize_std` of the pretraining, where its file says them; see `read_encoder`."""
    return {} if _needs_no_file(pretrain) else hub.read(_path(pretrain, section)).normalization()


class FrozenEncoder:
    """uint8 clips to tokens, without gradients and dropout.

    Args:
        pretrain: Which encoder.
        data: How clips are made, with the normalization that `with_normalization` fills in.
        resolution: Height and width of the clips.
        device: Device of the encoder.
        bfloat16: Compute in, and return, bfloat16 instead of float32.

    Attributes:
        module: The encoder.
        dtype: Type of the tokens.
        mean, std: Of the colors.
        fingerprint: See `fingerprint`.
    """

    def __init__(
        self, pretrain: PretrainConfig, data: ClipsConfig, resolution: int, device: torch.device, *, bfloat16: bool
    ):
        self.device = device
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32
        assert data.normalize_mean is not None
        assert data.normalize_std is not None
        self.mean, self.std = data.normalize_mean, data.normalize_std
        module = load(pretrain, data.frames_per_clip, resolution)
        self.module = module.to(device).eval().requires_grad_(False)
        self.fingerprint = fingerprint(self.module)

    @torch.no_grad()  # not inference_mode: heads save these tokens for their backward pass
    def __call__(self, clips: Tensor) -> Tensor:
        """uint8 clips [B, n, C, T, H, W] -> tokens [B, n, N, D] on the device."""
        x = to_float(clips.to(self.device, non_blocking=True).flatten(0, 1), self.mean, self.std)
        with autocast(self.device, self.dtype):
            tokens = self.module(x)
        return rearrange(tokens.to(self.dtype), "(B n) N D -> B n N D", B=len(clips))


def load_frozen(
    pretrain: PretrainConfig, data: ClipsConfig, resolution: int, world: World, *, bfloat16: bool
) -> FrozenEncoder:
    """Load the same encoder in all processes; ConfigError where they have read different weights."""
    encoder = FrozenEncoder(pretrain, data, resolution, world.device, bfloat16=bfloat16)
    if len(set(world.all_gather_object(encoder.fingerprint))) > 1:
        raise ConfigError("pretrain: the processes have read different weights; name one file in pretrain.checkpoint")
    return encoder


def load(pretrain: PretrainConfig, frames: int, side: int) -> Encoder:
    """Load the encoder of `pretrain` on the CPU. Raises ConfigError where it is missing or does not fit the clips."""
    try:
        encoder = read_encoder(pretrain, frames, side)
    except ValueError as error:
        raise _size_error("", frames, side, error) from None
    check_clip_size(encoder, frames, side)
    return encoder


def read_encoder(
    pretrain: PretrainConfig, frames: int, side: Size, *, section: str = "pretrain", weights: bool = True
) -> Encoder:
    """Load the encoder of `pretrain` on the CPU, whatever the size of the clips.

    Args:
        pretrain: Which encoder.
        frames: Frames of the clips, for a random encoder that is built without a file.
        side: Pixels of the clips, likewise.
        section: Key of `pretrain` in the configuration, for messages.
        weights: Load the weights; false: only build the architecture, on any device.

    Raises:
        ConfigError: There is no such file, or no such encoder in it.
        ValueError: The options of the encoder do not fit together.
    """
    if pretrain.checkpoint == RANDOM or not weights:
        return random_encoder(pretrain, side, frames, section)
    return hub.load_encoder(_path(pretrain, section), pretrain.checkpoint_key, **_arguments(pretrain))


def check_clip_size(encoder: Encoder, frames: int, side: int, task: str = "") -> None:
    """Raises ConfigError where the encoder cannot encode clips of `frames` × `side` × `side`, the sizes of `task`."""
    try:
        encoder.grid_size(frames, side, side)
    except ValueError as error:
        raise _size_error(f"tasks.{task}: " if task else "", frames, side, error) from None


def _size_error(at: str, frames: int, side: int, error: ValueError) -> ConfigError:
    return ConfigError(f"{at}data.frames_per_clip {frames}, optimization.resolution {side}: {error}")


def random_encoder(pretrain: PretrainConfig, resolution: Size, frames: int, section: str = "pretrain") -> Encoder:
    """Build an encoder with random weights.

    Its architecture is that of `pretrain.encoder` or of the run in `pretrain.folder`. Where neither says the size of
    the clips, it is built for `resolution` and `frames`.
    """
    arguments = _arguments(pretrain)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(pretrain.init_seed, "random encoder"))
        if not _needs_no_file(pretrain):
            return hub.read(_path(pretrain, section)).build_encoder(arguments)
        sizes = {"img_size": resolution, "num_frames": frames, "patch_size": 16, "tubelet_size": 2, **arguments}
        clip = ClipShape(sizes["num_frames"], sizes["img_size"], sizes["patch_size"], sizes["tubelet_size"])
        return build_encoder(drop_lacking_defaults(pretrain.encoder), clip)


def _needs_no_file(pretrain: PretrainConfig) -> bool:
    """Whether the YAML gives the architecture of a random encoder, so that no file is read."""
    return pretrain.checkpoint == RANDOM and "name" in pretrain.encoder


def _path(pretrain: PretrainConfig, section: str = "pretrain") -> Path:
    assert pretrain.folder is not None  # see `_needs_no_file`
    path = Path(pretrain.folder)
    if not path.exists():
        raise ConfigError(
            f"{section}.folder: {path} does not exist; give the folder of a pretraining run or of weights"
        )
    if pretrain.checkpoint not in (None, RANDOM):
        path = path / pretrain.checkpoint
    if not path.exists() and not checkpoint.is_latest(path):
        raise ConfigError(f"{section}.checkpoint: {path} does not exist; leave it out for the newest of a run")
    return path


def fingerprint(module: nn.Module) -> str:
    """Hash of everything that determines the output of a module: class, weights, and the options of its encoders."""
    digest = hashlib.sha256(repr(module).encode())
    for part in module.modules():
        if hasattr(part, "built_from"):
            digest.update(json.dumps(part.built_from, sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def _arguments(pretrain: PretrainConfig) -> dict[str, Any]:
    """The arguments of `hub.load_encoder` that the YAML gives."""
    names = {"resolution": "img_size", "frames_per_clip": "num_frames"}
    names |= {name: name for name in ("patch_size", "tubelet_size")}
    arguments = {argument: value for name, argument in names.items() if (value := getattr(pretrain, name)) is not None}
    return {**arguments, "encoder": pretrain.encoder}
