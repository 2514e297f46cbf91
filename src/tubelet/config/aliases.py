"""Translate the keys of V-JEPA and of earlier versions to the canonical ones.

Each file and each `key.path=value` override is translated before it is merged with the others, so that what comes later
wins, whichever way it is written. To rename a key, add an `Alias` to the table of its programs.
"""

import copy
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tubelet.config.base import ConfigError, nearest, snake_case

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Alias:
    """A key with another name, as dotted paths. `*` at the end of both stands for all keys of a section.

    Args:
        old: The other name.
        new: The canonical names. An option that several parts have is set in all of them.
        deprecated: Log a warning. V-JEPA's names are accepted without one.
        unset: Value that is the same as not giving the key. So a part that lacks the option is no error.
    """

    old: str
    new: tuple[str, ...]
    deprecated: bool = False
    unset: Any = ...


# Options that V-JEPA sets once for encoder and predictor, with their defaults.
SHARED = {
    "uniform_power": True,
    "use_rope": False,
    "rope_pairing": "interleaved",
    "use_silu": False,
    "wide_silu": True,
    "init_std": 0.02,
    "use_activation_checkpointing": False,
}
NOT_IN_VJEPA = ("rope_pairing", "init_std")


def _encoder(section: str, encoder: str, predictor: str | None = None, *, changes: bool = False) -> Iterator[Alias]:
    """Yield the aliases of a section that chooses the encoder, and with `predictor` the predictor.

    Args:
        section: The section.
        encoder: Canonical section of the encoder.
        predictor: Canonical section of the predictor.
        changes: The options are changes to those in a file of weights, where null is no change.
    """
    null = None if changes else ...
    yield Alias(f"{section}.encoder", (f"{encoder}.module",), deprecated=True, unset=null)
    yield Alias(f"{section}.model_name", (f"{encoder}.name",), unset=null)
    yield Alias(f"{section}.encoder_args.*", (f"{encoder}.*",), deprecated=True)
    for name, default in SHARED.items():
        targets = (f"{encoder}.{name}", *([f"{predictor}.{name}"] if predictor else []))
        unset = null if changes else default
        yield Alias(f"{section}.{name}", targets, deprecated=name in NOT_IN_VJEPA, unset=unset)


def _predictor(section: str, predictor: str | None) -> Iterator[Alias]:
    for name in ("depth", "embed_dim", "num_heads"):
        yield Alias(f"{section}.pred_{name}", (f"{predictor}.{name}",) if predictor else ())
    for name in ("use_mask_tokens", "zero_init_mask_tokens"):
        yield Alias(f"{section}.{name}", (f"{predictor}.{name}",) if predictor else ())
    for name in ("noise_schedule", "noise_beta", "noise_steps"):
        yield Alias(f"{section}.{name}", (f"{predictor}.{name}",) if predictor else (), deprecated=True)


FORMAT = Alias("data.dataset_type", ("data.format.name",))
BAD_FILES = Alias("data.max_bad_share", ("data.max_bad_fraction",), deprecated=True)

PRETRAINING = (
    *_encoder("model", "encoder", "objective.predictor"),
    *_predictor("model", "objective.predictor"),
    *(Alias(f"loss.{name}", (f"objective.{name}",)) for name in ("loss_exp", "reg_coeff")),
    *(
        Alias(f"loss.{name}", (f"objective.{name}",), deprecated=True)
        for name in ("std_coeff", "std_floor", "inv_coeff", "cov_coeff")
    ),
    Alias("optimization.ema", ("objective.ema",)),
    FORMAT,
    BAD_FILES,
)
# The section also existed for a linear head, with its defaults.
HEAD = (
    Alias("classifier.num_heads", ("head.num_heads",), unset=None),
    Alias("classifier.num_probe_blocks", ("head.num_probe_blocks",), unset=1),
)
HOLDOUT = Alias("optimization.holdout_share", ("optimization.holdout_fraction",), deprecated=True)
PROBE = (*_encoder("pretrain", "pretrain.encoder", changes=True), *HEAD, FORMAT, HOLDOUT)
BASELINES = (Alias("floors", ("kinds",), deprecated=True),)
# Of a pretraining's section `model` such a program uses the encoder only.
CLASSIFICATION = (*_encoder("model", "encoder"), *_predictor("model", None), *PROBE)
GENERATION = (*_encoder("model", "encoder"), *_predictor("model", None), FORMAT, BAD_FILES)


def _study(prefix: str = "") -> Iterator[Alias]:
    """Yield the aliases of a study's options, which have the `prefix` in the file of the zoo."""
    for old, new in (("floors", "baselines"), ("seconds.floors", "seconds.baselines")):
        yield Alias(f"{prefix}{old}", (f"{prefix}{new}",), deprecated=True)
    for name in ("kinds", "num_frames", "average"):
        yield Alias(f"{prefix}floors.{name}", (f"{prefix}baselines.{name}",), deprecated=True)


# By the value of `app` or `eval_name`; None: studies and the zoo, which have neither.
TABLES: dict[str | None, tuple[Alias, ...]] = {
    "vjepa": PRETRAINING,
    "classification": CLASSIFICATION,
    "generation": GENERATION,
    "video_classification_frozen": PROBE,
    "image_classification_frozen": PROBE,
    "baselines": BASELINES,
    None: (*_study(), *_study("study.")),
}
# Sections that select parts: a name is short for {name: …}.
PARTS = ("encoder", "objective", "objective.predictor", "head", "data.format")
# Parts whose options depend on their name, with the default name: naming another part drops the options.
SELECTED = {"objective": "vjepa", "data.format": "video_dataset", "head": "attentive"}
# Removed sections: the canonical sections that setting one on the command line replaces, and the keys
# there that do not belong to it.
REPLACED: dict[str, dict[str, tuple[str, ...]]] = {
    "model": {"encoder": (), "objective.predictor": ()},
    "model.encoder_args": {"encoder": ("name", "module", *SHARED)},
    "pretrain.encoder_args": {"pretrain.encoder": ("name", "module", *SHARED)},
    "loss": {"objective": ("name", "predictor", "ema")},
    "classifier": {"head": ("name",)},
}
# Renamed programs.
PROGRAMS = {"eval_name": {"floors": "baselines"}}

REPLACE = "replace"
"""Key of a mapping that replaces that of the base file: true, or (internally) a tuple of the names to keep."""


class _Delete:
    def __repr__(self) -> str:
        return "DELETE"

    def __deepcopy__(self, memo: Any) -> "_Delete":
        return self


DELETE = _Delete()
"""Value of a key that removes it from the base file's mapping."""


class Translation:
    """The aliases of one program, and which old names a configuration uses."""

    def __init__(self, program: str | None, quiet: bool = False):
        self.table = TABLES.get(program, ())
        self.sections = {new.rpartition(".")[0] for alias in self.table for new in alias.new}
        self.quiet = quiet
        self.written: dict[str, str] = {}
        """Canonical path -> old path, where the latter was used."""

    def layer(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the mapping of one file with canonical keys; it may hold `REPLACE` and `DELETE` for `merge`."""
        layer = copy.deepcopy(dict(raw))
        for path in [path for path in self.written if _get(layer, path) is not None]:
            del self.written[path]
        for key, names in PROGRAMS.items():
            if isinstance(layer.get(key), str):
                layer[key] = names.get(layer[key], layer[key])
        for alias in self.table:
            self._move(layer, alias)
        for section in self._old_sections():
            self._check_empty(layer, section)
        for path in PARTS:
            if isinstance(name := _get(layer, path), str):
                _set(layer, path, {"name": name})
                self.forget(path)
        tasks = layer.get("tasks")
        if isinstance(tasks, dict):
            layer["tasks"] = {
                name: self.layer(task) if isinstance(task, dict) else task for name, task in tasks.items()
            }
        return layer

    def override(self, path: str, value: Any) -> dict[str, Any] | None:
        """Return an override of an old key, or of a section with old keys, as a layer; None for any other one."""
        leaf = any(alias.old == path or _wildcard(alias.old, path) for alias in self.table)
        section = any(alias.old.startswith(f"{path}.") for alias in self.table)
        section &= isinstance(value, Mapping) or path in REPLACED
        part = path in PARTS and isinstance(value, str)
        selects = path.removesuffix(".name") in SELECTED and path.endswith(".name")
        unknown = any(path.startswith(f"{section}.") for section in self._old_sections())
        if not (leaf or section or part or selects or unknown):
            return None
        nested: dict[str, Any] = {}
        _set(nested, path, value)
        layer = self.layer(nested)
        # Setting a section replaces all of it.
        for target, kept in self._replaced(path).items() if isinstance(value, Mapping) else ():
            if _get(layer, target) is None:
                _set(layer, target, {})
            _get(layer, target)[REPLACE] = kept or True
        if (part or isinstance(value, Mapping)) and isinstance(_get(layer, path), dict):
            _get(layer, path)[REPLACE] = True
        return layer

    def forget(self, path: str) -> None:
        """Note that a canonical path and all keys below it have been set under this name."""
        for other in [other for other in self.written if other == path or other.startswith(f"{path}.")]:
            del self.written[other]

    def _move(self, layer: dict[str, Any], alias: Alias) -> None:
        section, wildcard = alias.old.removesuffix(".*"), alias.old.endswith(".*")
        parent, _, key = section.rpartition(".")
        node = _get(layer, parent) if parent else layer
        if not isinstance(node, dict) or key not in node:
            return
        if isinstance(node[key], Mapping) and not wildcard and alias.old in self.sections:
            return  # the canonical section of that name
        value = node.pop(key)
        self._warn(alias)
        for new in alias.new:
            if not wildcard:
                self._put(layer, new, section, DELETE if value == alias.unset else value)
            elif value is None:
                target = new.removesuffix(".*")
                if _get(layer, target) is None:
                    _set(layer, target, {})
                _get(layer, target)[REPLACE] = REPLACED[section][target]
            elif not isinstance(value, dict):
                raise ConfigError(f"{section}: expected a mapping, got {value!r}")
            else:
                for name, option in value.items():
                    self._put(layer, new.replace("*", name), f"{section}.{name}", option)

    def _put(self, layer: dict[str, Any], new: str, old: str, value: Any) -> None:
        parent = new.rpartition(".")[0]
        if isinstance(name := _get(layer, parent), str):
            _set(layer, parent, {"name": name})
        if _get(layer, new) is not None:
            raise ConfigError(f"{old}: the same as {new}, which is given, too; keep one of them")
        _set(layer, new, value)
        self.written[new] = old

    def _old_sections(self) -> list[str]:
        """Return the sections of which every key has another name now."""
        return [section for section in REPLACED if any(a.old.startswith(f"{section}.") for a in self.table)]

    def _replaced(self, section: str) -> dict[str, tuple[str, ...]]:
        """Return the entries of `REPLACED` for the canonical sections of this program."""
        sections = REPLACED.get(section, {}).items()
        return {target: kept for target, kept in sections if target in self.sections}

    def _check_empty(self, layer: dict[str, Any], section: str) -> None:
        """Remove an old section after its keys have been moved; raises ConfigError where unknown ones are left."""
        parent, _, key = section.rpartition(".")
        node = _get(layer, parent) if parent else layer
        if not isinstance(node, dict) or key not in node:
            return
        rest = node.pop(key)
        if rest is None:  # `model: null`
            for target, kept in self._replaced(section).items():
                if not kept:
                    _set(layer, target, DELETE)
        elif not isinstance(rest, dict):
            raise ConfigError(f"{section}: expected a mapping, got {rest!r}")
        elif rest:
            name = next(iter(rest))
            known = [
                a.old.removeprefix(f"{section}.").removesuffix(".*") for a in self.table if a.old.startswith(section)
            ]
            raise ConfigError(f"{section}.{name}: unknown key. {nearest(name, known)}")

    def _warn(self, alias: Alias) -> None:
        if alias.deprecated and not self.quiet:
            _warn_once(alias.old, " and ".join(alias.new))


@functools.cache
def _warn_once(old: str, new: str) -> None:
    logger.warning("%s is deprecated; use %s", old, new or "nothing in its place")


def program_of(raw: Mapping[str, Any]) -> str | None:
    """Return the program that a configuration is for, under its canonical name."""
    for key in ("app", "eval_name"):
        if isinstance(raw.get(key), str):
            return PROGRAMS.get(key, {}).get(raw[key], raw[key])
    return None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`: mappings are merged key by key, everything else is replaced.

    With `replace: true` a mapping of `over` replaces that of `base`.
    """
    replace = over.get(REPLACE, False)
    if replace is True:
        base = {}
    elif replace:
        base = {key: value for key, value in base.items() if key in replace}
    merged = dict(base)
    for key, value in over.items():
        if key == REPLACE and isinstance(value, bool | tuple):
            continue
        if value is DELETE:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def merge_layer(raw: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """As `merge`, for translated layers of a configuration: naming another part drops the options of the base's."""
    layer = copy.deepcopy(dict(layer))
    for path, default in SELECTED.items():
        name = _get(layer, f"{path}.name")
        if name is not None and snake_case(str(name)) != snake_case(str(_get(raw, f"{path}.name") or default)):
            _get(layer, path)[REPLACE] = True
    merged = merge(raw, layer)
    if _get(layer, "data.mask_type") is not None and "mask" not in layer:
        _forget_mask_names(merged)
    return merged


def finish(raw: dict[str, Any], written: dict[str, str]) -> dict[str, Any]:
    """Give the entries of `mask` without a name that of `data.mask_type`, and note that in `written`."""
    data, masks = raw.get("data"), raw.get("mask")
    name = data.pop("mask_type", None) if isinstance(data, dict) else None
    if name is not None and isinstance(masks, list):
        for index, mask in enumerate(masks):
            if isinstance(mask, dict) and "name" not in mask:
                written[f"mask.{index}.name"] = "data.mask_type"
        raw["mask"] = [{"name": name, **mask} if isinstance(mask, dict) else mask for mask in masks]
    return raw


def to_canonical(raw: Mapping[str, Any], program: str | None = None) -> dict[str, Any]:
    """Return a complete configuration, such as the `config.yaml` of a run of an earlier version, with canonical keys.

    Args:
        raw: The configuration.
        program: The program that it is for, where it does not say so itself.
    """
    translation = Translation(program_of(raw) or program, quiet=True)
    return finish(merge_layer({}, translation.layer(raw)), translation.written)


def _forget_mask_names(raw: dict[str, Any]) -> None:
    if isinstance(raw.get("mask"), list):
        raw["mask"] = [
            {key: value for key, value in mask.items() if key != "name"} if isinstance(mask, dict) else mask
            for mask in raw["mask"]
        ]


def _wildcard(old: str, path: str) -> bool:
    return old.endswith(".*") and (path.startswith(old[:-1]) or path == old[:-2])


def _get(node: Any, path: str) -> Any:
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def _set(node: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[last] = value
