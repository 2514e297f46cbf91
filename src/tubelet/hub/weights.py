"""State dicts of a file or folder, what it says about the architecture, and the modules built from both."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.config import Config, ConfigError, check, merge, nearest
from tubelet.config.aliases import Translation, to_canonical
from tubelet.data import NORMALIZATION
from tubelet.grid import ClipShape
from tubelet.models import EncoderOptions, PredictorOptions, build_encoder, build_predictor, drop_lacking_defaults
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.runtime import checkpoint

State = dict[str, Tensor]


class Parts(Mapping[str, State]):
    """State dicts of a checkpoint, each read and verified on first access.

    Args:
        path: The checkpoint.
        names: Those of its state dicts that are parts, as opposed to optimizers and such.
        encoders: Names of encoders. The first of them that is there also has the name `target_encoder`, if no part has.
        convert: Renames what was read.
    """

    def __init__(self, path: Path, names: Sequence[str], encoders: Sequence[str], convert: Callable[[State], State]):
        self._path, self._convert = path, convert
        self._stored_as: dict[str, str] = {name: name for name in names}
        if found := [name for name in encoders if name in names]:
            self._stored_as.setdefault("target_encoder", found[0])
        self._read: dict[str, State] = {}

    def __getitem__(self, name: str) -> State:
        stored_as = self._stored_as[name]
        if stored_as not in self._read:
            if not self._read:
                checkpoint.check_intact(self._path, "weights")
            self._read[stored_as] = self._convert(checkpoint.read_weights(self._path, [stored_as])[stored_as])
        return self._read[stored_as]

    def __contains__(self, name: object) -> bool:
        return name in self._stored_as  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_as)

    def __len__(self) -> int:
        return len(self._stored_as)


@dataclass(frozen=True)
class Weights:
    """State dicts with Tubelet's names, and what the file says about the architecture."""

    path: Path
    parts: Mapping[str, State]
    config: dict[str, Any]

    def load_encoder(self, checkpoint_key: str = "target_encoder", **arguments: Any) -> Encoder:
        """See `hub.load_encoder`."""
        state = self.part(checkpoint_key)
        encoder = self.build_encoder(arguments)
        state = without_unused(self.without_positions(state, encoder), encoder)
        checkpoint.load_weights(encoder, state, f"{checkpoint_key} of {self.path}")
        if isinstance(encoder, VisionTransformer):
            encoder.freeze_unused()
        return encoder

    def load_predictor(self, checkpoint_key: str = "predictor", **arguments: Any) -> Predictor:
        """See `hub.load_predictor`."""
        state = self.part(checkpoint_key)
        predictor = self.build_predictor(arguments, state)
        checkpoint.load_weights(predictor, self.without_positions(state, predictor), f"{checkpoint_key} of {self.path}")
        return predictor

    def part(self, name: str) -> State:
        if name not in self.parts:
            raise ConfigError(f"{self.path}: '{name}' is not in the file. {nearest(name, self.parts)}")
        return self.parts[name]

    def without_positions(self, state: State, module: Any) -> State:
        """Drop the fixed sin-cos positions. Raises ConfigError if they differ from those of the module."""
        stored = {name: state[name] for name in _FIXED_POSITIONS if name in state}
        if stored and not module.positions.use_rope:
            (name, theirs), ours = *stored.items(), module.positions.pos_embed
            if theirs.shape != ours.shape:
                raise ConfigError(
                    f"{self.path}: {name} is {list(theirs.shape)}, but {list(ours.shape)} for the sizes given; give "
                    "img_size, num_frames, patch_size and tubelet_size as in training (clips of other sizes still work)"
                )
            if not torch.allclose(theirs.float(), ours, atol=1e-3):
                raise ConfigError(
                    f"{self.path}: {name} differs from the positions of the arguments given; "
                    f"try uniform_power={not module.positions.uniform_power}, and check img_size and num_frames"
                )
        return without_fixed_positions(state)

    def architecture(self) -> dict[str, Any]:
        """Return the options of `encoder`, `predictor` and `sizes` that the file has."""
        raise NotImplementedError

    def normalization(self) -> dict[str, tuple[float, ...]]:
        """Return `normalize_mean` and `normalize_std` of the training clips, where the file has them."""
        return {}

    def build_encoder(self, arguments: dict[str, Any]) -> Encoder:
        """Build the encoder as the file says and `arguments` of `load_encoder` change it, with random weights."""
        options, clip = self._options(arguments)
        return build_encoder(options.encoder, clip)

    def build_predictor(self, arguments: dict[str, Any], state: State) -> Predictor:
        """Build the predictor of the sizes of `state`, with random weights."""
        num_mask_tokens = count(state, r"mask_tokens\.(\d+)")
        known = {
            "depth": count(state, r"predictor_blocks\.(\d+)\."),
            "embed_dim": state["predictor_norm.weight"].shape[0],
            "use_mask_tokens": num_mask_tokens > 0,
        }
        options, clip = self._options(arguments, known)
        with torch.device("meta"):
            encoder = build_encoder(options.encoder, clip)
        several = state.get("predictor_embed.0.weight")  # of the MLP that embeds several levels
        return build_predictor(
            options.predictor,
            encoder,
            clip,
            max(1, num_mask_tokens),
            out_dim=len(state["predictor_proj.weight"]),  # the width of a teacher may differ from the encoder's
            levels=1 if several is None else several.shape[1] // encoder.embed_dim,
            predict_context="predictor_proj_context.weight" in state,
        )

    def _options(
        self, arguments: dict[str, Any], predictor: dict[str, Any] | None = None
    ) -> tuple["Architecture", ClipShape]:
        """Merge the options of the file, `arguments`, and those known from the weights of the predictor."""
        raw = merge(self.architecture(), as_sections(arguments))
        sizes = {"img_size": 224, "num_frames": 16, "patch_size": 16, "tubelet_size": 2, **raw.pop("sizes")}
        raw = merge(raw, {"predictor": predictor or {}}) | {"encoder": drop_lacking_defaults(raw["encoder"])}
        options = check(raw, Architecture, self.path)
        return options, ClipShape(sizes["num_frames"], sizes["img_size"], sizes["patch_size"], sizes["tubelet_size"])


class Architecture(Config):
    """Options of the parts of a file of weights."""

    encoder: EncoderOptions
    predictor: PredictorOptions


def as_sections(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `load_encoder` by part: mappings to merge into `encoder`, `predictor` and `sizes`."""
    rest = dict(arguments)
    sizes = {name: rest.pop(name) for name in ("img_size", "num_frames", "patch_size", "tubelet_size") if name in rest}
    # A string is V-JEPA's and 0.1's way to name the encoder's file.
    encoder = rest.pop("encoder") if isinstance(rest.get("encoder"), dict) else {}
    predictor = rest.pop("predictor", {})
    translation = Translation("vjepa", quiet=True)
    flat = {alias.old.removeprefix("model.").removesuffix(".*") for alias in translation.table}
    old = translation.layer({"model": {name: rest.pop(name) for name in list(rest) if name in flat}})
    encoder = merge(merge(old.get("encoder", {}), encoder), rest)
    predictor = merge(old.get("objective", {}).get("predictor", {}), predictor)
    return {"encoder": encoder, "predictor": predictor, "sizes": sizes}


class OwnWeights(Weights):
    """A checkpoint of Tubelet, which holds the complete configuration."""

    def architecture(self) -> dict[str, Any]:
        config = to_canonical(self.config, "vjepa")
        clip = config.get("clip") or config["data"]
        sizes = {"img_size": clip["crop_size"]} | {n: clip[n] for n in ("num_frames", "patch_size", "tubelet_size")}
        predictor = (config.get("objective") or {}).get("predictor") or {}
        return {"encoder": config["encoder"], "predictor": predictor, "sizes": sizes}

    def normalization(self) -> dict[str, tuple[float, ...]]:
        section = self.config.get("data_aug", {})
        return {name: tuple(section[name]) for name in NORMALIZATION if name in section}


_FIXED_POSITIONS = ("pos_embed", "predictor_pos_embed")
_OPTIONAL = ("level_norms.", "patch_embed_img.")


def without_fixed_positions(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name not in _FIXED_POSITIONS}


def without_unused(state: State, module: nn.Module) -> State:
    """Drop the weights of levels and of the image tokenizer where the module is built without them."""
    expected = tuple(module.state_dict())
    unused = tuple(part for part in _OPTIONAL if not any(name.startswith(part) for name in expected))
    return {name: tensor for name, tensor in state.items() if not name.startswith(unused)}


def count(state: State, pattern: str) -> int:
    """Count the distinct values of the pattern's group among the names in the state dict."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})
