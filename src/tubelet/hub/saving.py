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
    if (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} is the folder of a run, whose checkpoints would be removed; save in another one")
    built_from = {name: _built_from(name, part) for name, part in parts.items()}
    encoders = [name for name, origin in built_from.items() if "encoder" in origin]
    if not encoders:
        raise ConfigError(f"no encoder among {', '.join(parts) or 'no parts'}; give the one that they belong to")
    config: dict[str, Any] = {"data_aug": {name: list(values) for name, values in normalization.items()}}
    for name, origin in built_from.items():
        for key, options in origin.items():
            if config.setdefault(key, options) != options:
                raise ConfigError(
                    f"{name}: its options of {key} are {options}, those of another part {config[key]}; save parts that "
                    "do not belong together in folders of their own"
                )
    if "predictor" in config:
        config["objective"] = {"predictor": config.pop("predictor")}  # as in the configuration of a run
    weights = {name: part.state_dict() for name, part in parts.items()}
    metadata = {"step": step, "config": config, "encoders": encoders}
    others = checkpoint.find(folder / "checkpoints")
    path = checkpoint.save(folder / "checkpoints", step, CheckpointState(weights, {}, metadata), keep=len(others) + 1)
    for other in others:
        if other != path:  # also of later steps, of a longer training before
            checkpoint.remove(other)
    return path


def _built_from(name: str, part: nn.Module) -> dict[str, Any]:
    built_from = getattr(part, "built_from", None)
    if not isinstance(built_from, dict):
        raise ConfigError(f"{name}: nothing says how it was built; build it with build_encoder or build_predictor")
    return built_from
