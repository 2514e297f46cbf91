"""Checkpoints of modules that were trained without the Trainer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tubelet.config import ConfigError
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointState


def save(folder: Path, parts: Mapping[str, nn.Module], step: int, normalization: Mapping[str, Sequence[float]]) -> Path:
    """See `hub.save`."""
    config: dict[str, Any] = {"data_aug": {name: list(values) for name, values in normalization.items()}}
    for name, part in parts.items():
        built_from = getattr(part, "built_from", None)
        if built_from is None:
            raise ConfigError(f"{name}: nothing says how it was built; build it with build_encoder or build_predictor")
        built_from = {"objective": built_from, "clip": built_from["clip"]} if "predictor" in built_from else built_from
        for key, options in built_from.items():
            if config.setdefault(key, options) != options:
                raise ConfigError(f"{name}: its {key} differs from that of another part: {options}; save it by itself")
    if "encoder" not in config:
        raise ConfigError(f"no encoder among {', '.join(parts) or 'no parts'}; give the one that the others belong to")
    encoders = [name for name, part in parts.items() if "encoder" in part.built_from]
    weights = {name: part.state_dict() for name, part in parts.items()}
    state = CheckpointState(weights, {}, {"step": step, "config": config, "encoders": encoders})
    return checkpoint.save(folder / "checkpoints", step, state, keep=1)
