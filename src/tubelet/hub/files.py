"""Open files of weights: which state dicts they hold, and what kind of training wrote them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tubelet.hub import released, transformers
from tubelet.hub.state import Parts, State
from tubelet.hub.weights import OwnWeights, Weights
from tubelet.runtime import checkpoint, checkpoint_format, checkpoint_v1, file_formats
from tubelet.runtime.checkpoint import CheckpointError

logger = logging.getLogger(__name__)

_ENCODER = "patch_embed.proj.weight"  # of every encoder that can be read from a released file


def open_run(file: Path, metadata: Mapping[str, Any]) -> Weights:
    """Open a checkpoint of Tubelet, which holds its configuration."""
    stored = checkpoint.parts(file)
    parts = Parts(file, stored, metadata.get("encoders") or released.AVERAGES, released.to_tubelet)
    _check_holds_weights(file, parts, [*stored, *metadata])
    if not isinstance(metadata["config"], Mapping):
        raise CheckpointError(f"{file}: its config is a {type(metadata['config']).__name__}, not that of a training")
    return OwnWeights(file, parts, dict(metadata["config"]))


def open_released(file: Path) -> Weights:
    """Open a file of V-JEPA's kind, or of torch.save with the state dict of an encoder."""
    stored = checkpoint.parts(file)
    names = [name for name in stored if name in released.PARTS]
    if {"target_encoder", "ema_encoder"} <= set(names):
        logger.warning("%s has a target_encoder and an ema_encoder; checkpoint_key chooses between them", file)
    parts: Mapping[str, State] = Parts(file, names, released.AVERAGES, released.to_tubelet)
    if "target_encoder" not in parts and file.is_file():
        parts = _single_encoder(file) or parts
    contents = checkpoint_v1.describe(file) if file.is_file() else stored
    _check_holds_weights(file, parts, contents)
    if "target_encoder" not in parts:
        raise CheckpointError(
            f"{file}: holds a predictor without the encoder that it belongs to, whose width and heads it needs; give "
            "the complete file"
        )
    return _of_kind(file, parts)


def open_safetensors(file: Path) -> Weights:
    """Open a file of safetensors with the state dict of an encoder."""
    tensors = transformers.read_tensors(file)
    if any(name.removeprefix("vjepa2.").startswith("encoder.embeddings.") for name in tensors):
        raise CheckpointError(f"{file}: the weights of a model of transformers; give its folder, with config.json")
    if (file.parent / checkpoint_format.METADATA).is_file():
        raise CheckpointError(f"{file}: a part of a checkpoint of Tubelet; give its folder, {file.parent}")
    parts = _as_encoder(released.to_tubelet(tensors))
    _check_holds_weights(file, parts, list(tensors))
    return _of_kind(file, parts)


def _of_kind(file: Path, parts: Mapping[str, State]) -> Weights:
    kind = released.VJEPA21Weights if released.is_vjepa2_1(parts) else released.ReleasedWeights
    return kind(file, parts, {})


def _single_encoder(file: Path) -> dict[str, State]:
    """Return the only state dict of an encoder in a file of torch.save: the file itself, or one of its entries."""
    checkpoint_v1.check_intact(file)
    content = checkpoint_v1.read_file(file)
    candidates = {"the file": content, **{name: value for name, value in content.items() if isinstance(value, dict)}}
    found = {}
    for name, value in candidates.items():
        if value and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items()):
            found[name] = _as_encoder(released.to_tubelet(value))
    encoders = [name for name in found if found[name]]
    if len(encoders) != 1:
        return {}
    logger.info("%s: %s is the state dict of an encoder", file, encoders[0])
    return found[encoders[0]]


def _as_encoder(state: State) -> dict[str, State]:
    return {"encoder": state, "target_encoder": state} if _ENCODER in state else {}


def _check_holds_weights(file: Path, parts: Mapping[str, State], contents: list[str]) -> None:
    if "target_encoder" not in parts and "predictor" not in parts:
        raise CheckpointError(
            f"{file}: no encoder or predictor in it; it holds {', '.join(contents[:12]) or 'nothing'}"
            f"{', …' if len(contents) > 12 else ''}. Write {file_formats.SAVE}"
        )
