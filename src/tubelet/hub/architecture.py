"""What is known of the architecture that weights were trained in, and how it differs from the one they are read into.

Weights of equal names and shapes fit many architectures: the number of attention heads and the kind of positions leave
no trace in a shape. `Facts` say what a file of weights determines; `check` compares them with what is asked for.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError
from tubelet.models import ENCODERS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fact:
    """What is known of one option.

    Args:
        value: Its value in training.
        source: How it is known: completes "22 …", such as "in its configuration".
        certain: False if it was assumed, as for a file that looks like a published one. Other values are then only
            warned of.
    """

    value: Any
    source: str
    certain: bool = True


Facts = Mapping[str, Fact]
"""Facts by dotted keys: `encoder.num_heads`, `predictor.depth`, `sizes.img_size`, `data_aug.normalize_mean`."""

# Options that do not change what the weights compute: they concern training, or select what is returned.
_FREE = (
    "init_std", "depth_scaled_init", "zero_init_mask_tokens", "use_activation_checkpointing", "weights",
    "norm_momentum", "out_layers", "num_classes", "levels", "image_tokenizer", "name", "module",
)  # fmt: skip
# Options under which the weights mean something else. Another value of other options is warned of, as a run may change
# them deliberately, such as `block_causal` or the normalization of clips.
_MEANING = (
    "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_scale", "in_chans", "use_silu", "wide_silu",
    "uniform_power", "use_rope", "rope_pairing", "rope_extent", "patch_size", "tubelet_size", "img_size", "num_frames",
    "use_mask_tokens", "noise_schedule", "noise_beta", "noise_steps", "predicted_width", "predict_context",
)  # fmt: skip
# Options that count for one value of another option only.
_CONDITIONS = {
    "uniform_power": ("use_rope", False),
    "rope_pairing": ("use_rope", True),
    "rope_extent": ("use_rope", True),
    "wide_silu": ("use_silu", True),
    "noise_schedule": ("use_mask_tokens", False),
    "noise_beta": ("use_mask_tokens", False),
    "noise_steps": ("use_mask_tokens", False),
}


def facts_of(section: str, values: Mapping[str, Any], source: str, certain: bool = True) -> dict[str, Fact]:
    """Return facts about the options of a section that come from one source."""
    return {f"{section}.{name}": Fact(value, source, certain) for name, value in values.items()}


def sections(facts: Facts) -> dict[str, dict[str, Any]]:
    """Return the values of facts by section, as a configuration."""
    result: dict[str, dict[str, Any]] = {"encoder": {}, "predictor": {}, "sizes": {}}
    for key, fact in facts.items():
        section, _, name = key.partition(".")
        result.setdefault(section, {})[name] = fact.value
    return result


def keys(raw: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return what is asked for by dotted keys. The name of an encoder stands for the options that it presets."""
    wanted: dict[str, Any] = {}
    for section, options in raw.items():
        if section == "encoder" and "name" in options:
            options = {**_preset(options), **options}
        wanted |= {f"{section}.{name}": value for name, value in options.items()}
    return wanted


def check(
    path: str | Path,
    facts: Facts,
    wanted: Mapping[str, Any],
    remedy: Callable[[str, Any], str],
    adaptable: Iterable[str] = (),
) -> None:
    """Compare what is known of the weights with what is asked for.

    Args:
        path: Where the weights come from, for messages.
        facts: What is known of them.
        wanted: Values by the keys of facts; others are not compared.
        remedy: Returns what to do where the value of a key has to be another one.
        adaptable: Further keys whose other values are warned of only.

    Raises:
        ConfigError: Under an option with another value the weights would mean something else.
    """
    refused = []
    known = {**wanted, **{key: fact.value for key, fact in facts.items()}}
    for key, value in wanted.items():
        fact = facts.get(key)
        if fact is None or not _counts(key, known) or _same(fact.value, value):
            continue
        line = f"{key} is {text(fact.value)} {fact.source}, here {text(value)}"
        if fact.certain and key not in adaptable and key.rpartition(".")[2] in _MEANING:
            refused.append(f"  {line}; {remedy(key, fact.value)}")
        else:
            logger.warning("%s: %s. Unless that is intended, %s", path, line, remedy(key, fact.value))
    if refused:
        raise ConfigError("\n".join([f"{path}: its weights belong to another architecture:", *refused]))


def _counts(key: str, values: Mapping[str, Any]) -> bool:
    """Whether the option changes what the weights compute, with the other options `values`."""
    section, _, name = key.rpartition(".")
    if name in _FREE or "drop" in name:
        return False
    other, value = _CONDITIONS.get(name, ("", None))
    return values.get(f"{section}.{other}", value) == value


def _same(known: Any, value: Any) -> bool:
    if isinstance(known, list | tuple | int) and isinstance(value, list | tuple):
        known = [known] * len(value) if isinstance(known, int) else list(known)  # a size: 224 or [224, 224]
        return len(known) == len(value) and all(map(_same, known, value))
    if isinstance(known, list | tuple) and isinstance(value, int):
        return _same(value, known)
    if isinstance(known, float | int) and isinstance(value, float | int):
        return math.isclose(known, value, rel_tol=1e-3)  # an mlp_ratio is known as a number of channels
    return known == value


def text(value: Any) -> str:
    """Return a value as in YAML."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)


def _preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the name of an encoder presets, such as the width and heads of `vit_large`."""
    factory: Any = ENCODERS.find(options["name"], options.get("module"))
    preset: dict[str, Any] = {}
    while isinstance(factory, functools.partial):
        preset = {**factory.keywords, **preset}
        factory = factory.func
    return preset
