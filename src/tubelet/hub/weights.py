"""State dicts of a file or folder, what is known of their architecture, and the modules built from both."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tubelet.config import Config, ConfigError, check, merge, nearest
from tubelet.config.aliases import SHARED
from tubelet.config.translation import Translation, to_canonical
from tubelet.data import NORMALIZATION
from tubelet.grid import ClipShape
from tubelet.hub import architecture
from tubelet.hub.architecture import Facts, facts_of
from tubelet.hub.state import State, check_numbers, count, predictor_facts, without_fixed_positions, without_unused
from tubelet.models import (
    EncoderOptions,
    PredictorOptions,
    build_encoder,
    build_predictor,
    drop_lacking_defaults,
)
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.runtime import checkpoint

_SIZES = ("img_size", "num_frames", "patch_size", "tubelet_size")


@dataclass(frozen=True)
class Weights:
    """State dicts with Tubelet's names, and what is known of their architecture."""

    path: Path
    parts: Mapping[str, State]
    config: dict[str, Any]

    def load_encoder(self, checkpoint_key: str = "target_encoder", **arguments: Any) -> Encoder:
        """See `hub.load_encoder`."""
        state = self.part(checkpoint_key)
        self.check_arguments(arguments)
        with self._explaining_options():
            encoder = self.build_encoder(arguments)
        state = without_unused(without_fixed_positions(state), encoder)
        check_numbers(state, f"{checkpoint_key} of {self.path}")
        checkpoint.load_weights(encoder, state, f"{checkpoint_key} of {self.path}")
        if isinstance(encoder, VisionTransformer):
            encoder.freeze_unused()
        return encoder

    def load_predictor(self, checkpoint_key: str = "predictor", **arguments: Any) -> Predictor:
        """See `hub.load_predictor`."""
        state = self.part(checkpoint_key)
        self.check_arguments(arguments, state)
        with self._explaining_options():
            predictor = self.build_predictor(arguments, state)
        what = f"{checkpoint_key} of {self.path}"
        check_numbers(state, what)
        checkpoint.load_weights(predictor, without_fixed_positions(state), what)
        return predictor

    def part(self, name: str) -> State:
        if name not in self.parts:
            raise ConfigError(f"{self.path}: '{name}' is not in the file. {nearest(name, self.parts)}")
        return self.parts[name]

    @contextlib.contextmanager
    def _explaining_options(self) -> Iterator[None]:
        """Turn the error of options that do not fit together into a ConfigError."""
        try:
            yield
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}") from error

    def facts(self) -> Facts:
        """Return what is known of the encoder and of the sizes of clips and tokens."""
        raise NotImplementedError

    def predictor_facts(self, state: State) -> Facts:
        """Return what is known of the predictor with the weights `state`."""
        return predictor_facts(state, self.path)

    def normalization(self) -> dict[str, tuple[float, ...]]:
        """Return `normalize_mean` and `normalize_std` of the training clips, where they are known."""
        return {}

    def complete(self, wanted: Mapping[str, Any], predictor: bool) -> None:
        """Raise ConfigError where neither the file nor the arguments say what is needed."""

    def check_arguments(self, arguments: dict[str, Any], predictor: State | None = None) -> None:
        """Raise ConfigError where arguments contradict what is known of the weights, or do not complete it.

        Args:
            arguments: Those of `load_encoder`.
            predictor: Weights of the predictor that is to be loaded, too.
        """
        wanted = architecture.keys(as_sections(arguments))
        facts = {**self.facts(), **(self.predictor_facts(predictor) if predictor is not None else {})}
        compared = {key: value for key, value in wanted.items() if not self._is_free_size(key, facts)}
        if predictor is None:  # V-JEPA's names set options of the predictor, too
            compared = {key: value for key, value in compared.items() if not key.startswith("predictor.")}
        architecture.check(self.path, facts, compared, _argument_remedy)
        self.complete(wanted, predictor is not None)

    def _is_free_size(self, key: str, facts: Facts) -> bool:
        """Whether another size of clips changes no feature: that of rotary positions, which count rows and frames."""
        rope = facts.get("encoder.use_rope")
        return key in ("sizes.img_size", "sizes.num_frames") and rope is not None and rope.value

    def build_encoder(self, arguments: dict[str, Any]) -> Encoder:
        """Build the encoder as the file says and `arguments` of `load_encoder` change it, with random weights."""
        options, clip = self._options(self.facts(), arguments)
        return build_encoder(options.encoder, clip)

    def build_predictor(self, arguments: dict[str, Any], state: State) -> Predictor:
        """Build the predictor of the sizes of `state`, with random weights."""
        options, clip = self._options({**self.facts(), **self.predictor_facts(state)}, arguments)
        with torch.device("meta"):
            encoder = build_encoder(options.encoder, clip)
        return build_predictor(
            options.predictor,
            encoder,
            clip,
            max(1, count(state, r"mask_tokens\.(\d+)")),
            out_dim=out_dim(state),
            levels=levels_read(state, encoder.embed_dim),
            predict_context="predictor_proj_context.weight" in state,
        )

    def _options(self, facts: Facts, arguments: dict[str, Any]) -> tuple["Architecture", ClipShape]:
        """Merge what is known and `arguments`."""
        raw = merge(architecture.sections(facts), as_sections(arguments))
        sizes = {"img_size": 224, "num_frames": 16, "patch_size": 16, "tubelet_size": 2, **raw["sizes"]}
        parts = {"encoder": drop_lacking_defaults(raw["encoder"]), "predictor": raw["predictor"]}
        options = check(parts, Architecture, self.path)
        return options, ClipShape(sizes["num_frames"], sizes["img_size"], sizes["patch_size"], sizes["tubelet_size"])


class Architecture(Config):
    """Options of the parts of a file of weights."""

    encoder: EncoderOptions
    predictor: PredictorOptions


def as_sections(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `load_encoder` by part: mappings to merge into `encoder`, `predictor` and `sizes`."""
    rest = dict(arguments)
    sizes = {name: rest.pop(name) for name in _SIZES if name in rest}
    # A string is V-JEPA's and 0.1's way to name the encoder's file.
    encoder = rest.pop("encoder") if isinstance(rest.get("encoder"), dict) else {}
    predictor = rest.pop("predictor", {})
    translation = Translation("vjepa", quiet=True)
    flat = {alias.old.removeprefix("model.").removesuffix(".*") for alias in translation.table}
    old = translation.layer({"model": {name: rest.pop(name) for name in list(rest) if name in flat}})
    encoder = merge(merge(old.get("encoder", {}), encoder), rest)
    predictor = merge(old.get("objective", {}).get("predictor", {}), predictor)
    for name in SHARED.keys() & arguments.keys():  # given, even if it is the default
        encoder[name] = predictor[name] = arguments[name]
    return {"encoder": encoder, "predictor": predictor, "sizes": sizes}


class OwnWeights(Weights):
    """A checkpoint of Tubelet, which holds the complete configuration."""

    SOURCE = "in the configuration of its training"

    def facts(self) -> Facts:
        options, clip = self._canonical()
        sizes = {"img_size": clip["crop_size"], **{name: clip[name] for name in _SIZES[1:]}}
        encoder = options.encoder.model_dump()
        return facts_of("encoder", encoder, self.SOURCE) | facts_of("sizes", sizes, self.SOURCE)

    def predictor_facts(self, state: State) -> Facts:
        options = self._canonical()[0].predictor.model_dump()
        if options.get("num_heads", ...) is None:
            options["num_heads"] = self.facts()["encoder.num_heads"].value
        return {**facts_of("predictor", options, self.SOURCE), **self._by_weights(state)}

    def _by_weights(self, state: State) -> Facts:
        """Return what the weights of a VisionTransformerPredictor tell. Those of others need not be named like its."""
        return predictor_facts(state, self.path) if "predictor_blocks.0.mlp.fc1.weight" in state else {}

    def normalization(self) -> dict[str, tuple[float, ...]]:
        section = self.config.get("data_aug") or {}
        return {name: tuple(section[name]) for name in NORMALIZATION if name in section}

    def _canonical(self) -> tuple["Architecture", dict[str, Any]]:
        """Return the options in the configuration, and its section with the size of the clips."""
        config = to_canonical(self.config, "vjepa")
        clip = config.get("clip") or config.get("data")
        clip = clip if isinstance(clip, dict) else {}
        missing = [name for name in ("crop_size", *_SIZES[1:]) if name not in clip]
        if not isinstance(config.get("encoder"), dict) or missing:
            raise checkpoint.CheckpointError(
                f"{self.path}: the configuration in it lacks `encoder`, or the sizes in `data` ({', '.join(missing)}): "
                "not a training of an encoder by Tubelet, or written by another program"
            )
        predictor = (config.get("objective") or {}).get("predictor") or {}
        parts = {"encoder": drop_lacking_defaults(config["encoder"]), "predictor": predictor}
        return check(parts, Architecture, self.path), clip


def out_dim(predictor: State) -> int | None:
    """Return the width that a predictor predicts, which may be that of a wider teacher; None where no name tells."""
    return len(predictor["predictor_proj.weight"]) if "predictor_proj.weight" in predictor else None


def levels_read(predictor: State, embed_dim: int) -> int:
    """Return the number of levels of the encoder that a predictor reads, which an MLP embeds if there are several."""
    first = predictor.get("predictor_embed.0.weight")
    return 1 if first is None else first.shape[1] // embed_dim


def _argument_remedy(key: str, value: Any) -> str:
    """Return what to do about an argument of `load_encoder` that contradicts the weights."""
    section, _, name = key.rpartition(".")
    if key in ("sizes.img_size", "sizes.num_frames"):
        return f"leave {name} out: the encoder takes clips of other sizes, too, and interpolates its positions"
    name = f"pred_{name}" if section == "predictor" and name in ("depth", "embed_dim", "num_heads") else name
    return f"set {name}={value!r}, or leave it out"
