"""What a report needs of the `config.yaml` of a run; the only place that knows the layout of that file."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError, check
from tubelet.config.registry import find
from tubelet.config.translation import to_canonical
from tubelet.config.yaml_files import read_yaml
from tubelet.data import AugConfig, DataConfig
from tubelet.grid import Grid
from tubelet.masks import build_collator
from tubelet.report.curves import Curves
from tubelet.report.damage import NO_MAPPING, damaged

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClipOptions:
    """How a run reads and masks its clips.

    Args:
        data: Section `data`.
        augmentation: Section `data_aug`.
        dataset: Class of the data set.
        grid: Token grid of a clip.
        masks: Draws the masks of the run; None where it has no masks.
    """

    data: DataConfig
    augmentation: AugConfig
    dataset: Any
    grid: Grid
    masks: Any | None


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return the resolved configuration of a run folder; None where there is none, e.g. a study without pretraining.

    Raises:
        ConfigError: The file is damaged. The message names it.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return None
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise damaged(path, "it is empty" if content is None else NO_MAPPING)
    try:
        config = to_canonical(content)
    except ConfigError as error:
        raise damaged(path, error) from None
    objective = config.get("objective") or {}
    if not isinstance(objective, dict):
        raise damaged(path, f"objective: {NO_MAPPING}")
    if not isinstance(objective.get("name", ""), str):
        raise damaged(path, "objective.name: it is not a name")
    return config


def has_masks(config: dict[str, Any]) -> bool:
    """Whether the run hides tokens from the encoder."""
    return bool(config.get("mask"))


def objective_curves(config: dict[str, Any]) -> Sequence[Curves] | None:
    """Return `CURVES` of the module of the run's objective; None where it has none or cannot be imported."""
    name = objective_name(config)
    if name is None:
        return None
    try:
        module = find("objectives", name)
    except (ConfigError, ImportError) as error:
        logger.warning("objective.name: %s; the report shows the metrics `loss` and `loss_*`", error)
        return None
    return getattr(module, "CURVES", None)


def objective_name(config: dict[str, Any]) -> str | None:
    """Return the name of the objective of a pretraining; None for other programs."""
    if config.get("app", "vjepa") != "vjepa":
        return None
    return (config.get("objective") or {}).get("name", "vjepa")


def clip_options(config: dict[str, Any], path: Path) -> ClipOptions:
    """Return how the run reads its clips.

    Args:
        config: Result of `read_config`.
        path: File of the configuration, for messages.

    Raises:
        ConfigError: An option is invalid, or a part is not found.
    """
    for key in ("data", "data_aug"):
        if not isinstance(config.get(key) or {}, Mapping):
            raise damaged(path, f"{key}: {NO_MAPPING}")
    data = check(config.get("data") or {}, DataConfig, path)
    try:
        masks = build_collator(config["mask"], data.clip_shape) if has_masks(config) else None
    except (TypeError, ValueError) as error:  # TypeError: no list
        raise damaged(path, f"mask: {error}") from None
    return ClipOptions(
        data,
        check(config.get("data_aug") or {}, AugConfig, path),
        find("data", data.format.name).Dataset,
        data.clip_shape.grid,
        masks,
    )
