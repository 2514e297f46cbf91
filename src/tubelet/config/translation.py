"""Translate the keys of a configuration to the canonical ones; see `tubelet.config.aliases` for the tables.

Each file and each `key.path=value` override is translated before it is merged with the others, so that what comes later
wins, whichever way it is written.
"""

import copy
import functools
import logging
from collections.abc import Mapping
from typing import Any

from tubelet.config.aliases import PARTS, PROGRAMS, REPLACED, SELECTED, TABLES, Alias
from tubelet.config.base import ConfigError, nearest, snake_case
from tubelet.config.merging import DELETE, REPLACE, get, merge, pop, put

logger = logging.getLogger(__name__)

_MISSING = object()


def program_of(raw: Mapping[str, Any]) -> str | None:
    """Return the program that a configuration is for, under its canonical name."""
    for key in ("app", "eval_name"):
        if isinstance(raw.get(key), str):
            return PROGRAMS.get(key, {}).get(raw[key], raw[key])
    return None


def to_canonical(raw: Mapping[str, Any], program: str | None = None) -> dict[str, Any]:
    """Return a complete configuration, such as the `config.yaml` of a run of an earlier version, with canonical keys.

    Args:
        raw: The configuration.
        program: The program that it is for, where it does not say so itself.
    """
    translation = Translation(program_of(raw) or program, quiet=True)
    return name_masks(merge_layer({}, translation.layer(raw)), translation.written)


class Translation:
    """The aliases of one program, and which old names a configuration uses.

    Args:
        program: Name of the program, see `aliases.TABLES`.
        quiet: Do not warn of deprecated names.

    Attributes:
        table: The aliases.
        written: Canonical path -> old path, where the latter was used.
    """

    def __init__(self, program: str | None, quiet: bool = False):
        self.quiet = quiet
        self.written: dict[str, str] = {}
        self.table = TABLES.get(program, ())
        self._canonical_sections = {new.rpartition(".")[0] for alias in self.table for new in alias.new}
        # Sections of which every key has another name now.
        self._old_sections = [old for old in REPLACED if any(a.old.startswith(f"{old}.") for a in self.table)]

    def layer(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return the mapping of one file with canonical keys; it may hold `REPLACE` and `DELETE` for `merge`."""
        layer = copy.deepcopy(dict(raw))
        for path in [path for path in self.written if get(layer, path) is not None]:
            del self.written[path]
        for key, names in PROGRAMS.items():
            if isinstance(layer.get(key), str):
                layer[key] = names.get(layer[key], layer[key])
        for alias in self.table:
            self._move(layer, alias)
        for section in self._old_sections:
            self._remove(layer, section)
        for path in PARTS:
            if isinstance(get(layer, path), str):
                _section(layer, path)
                self.forget(path)
        tasks = layer.get("tasks")
        if isinstance(tasks, dict):
            layer["tasks"] = {
                name: self.layer(task) if isinstance(task, dict) else task for name, task in tasks.items()
            }
        return layer

    def override(self, path: str, value: Any) -> dict[str, Any] | None:
        """Return an override of an old key, or of a section with old keys, as a layer; None for any other one."""
        old_key = any(alias.covers(path) for alias in self.table)
        old_section = any(alias.old.startswith(f"{path}.") for alias in self.table)
        old_section &= isinstance(value, Mapping) or path in REPLACED
        part = path in PARTS and isinstance(value, str)
        selects = path.removesuffix(".name") in SELECTED and path.endswith(".name")
        unknown = any(path.startswith(f"{section}.") for section in self._old_sections)
        if not (old_key or old_section or part or selects or unknown):
            return None
        nested: dict[str, Any] = {}
        put(nested, path, value)
        layer = self.layer(nested)
        # Setting a section replaces all of it.
        if isinstance(value, Mapping):
            for target, kept in self._replaced(path).items():
                _section(layer, target)[REPLACE] = kept or True
        if (part or isinstance(value, Mapping)) and isinstance(get(layer, path), dict):
            get(layer, path)[REPLACE] = True
        return layer

    def forget(self, path: str) -> None:
        """Note that a canonical path and all keys below it have been set under this name."""
        for other in [other for other in self.written if other == path or other.startswith(f"{path}.")]:
            del self.written[other]

    def _move(self, layer: dict[str, Any], alias: Alias) -> None:
        """Move the value of an old key or section to the canonical ones."""
        old = alias.old.removesuffix(".*")
        value = get(layer, old, _MISSING)
        if value is _MISSING:
            return
        if isinstance(value, Mapping) and alias.old in self._canonical_sections:
            return  # the canonical section of that name
        pop(layer, old)
        if alias.deprecated and not self.quiet:
            _warn_once(alias.old, " and ".join(alias.new))
        for new in alias.new:
            if alias.is_section:
                self._put_section(layer, new.removesuffix(".*"), old, value)
            else:
                self._put(layer, new, old, DELETE if value == alias.unset else value)

    def _put_section(self, layer: dict[str, Any], new: str, old: str, options: Any) -> None:
        if options is None:
            _section(layer, new)[REPLACE] = REPLACED[old][new]
        elif not isinstance(options, dict):
            raise ConfigError(f"{old}: expected a mapping, got {options!r}")
        else:
            for name, option in options.items():
                self._put(layer, f"{new}.{name}", f"{old}.{name}", option)

    def _put(self, layer: dict[str, Any], new: str, old: str, value: Any) -> None:
        if get(layer, new) is not None:
            raise ConfigError(f"{old}: the same as {new}, which is given, too; keep one of them")
        parent, _, key = new.rpartition(".")
        (_section(layer, parent) if parent else layer)[key] = value
        self.written[new] = old

    def _remove(self, layer: dict[str, Any], section: str) -> None:
        """Remove an old section after its keys have been moved; raises ConfigError where unknown ones are left."""
        rest = get(layer, section, _MISSING)
        if rest is _MISSING:
            return
        pop(layer, section)
        if rest is None:  # `model: null`
            for target, kept in self._replaced(section).items():
                if not kept:
                    put(layer, target, DELETE)
        elif not isinstance(rest, dict):
            raise ConfigError(f"{section}: expected a mapping, got {rest!r}")
        elif rest:
            name = next(iter(rest))
            known = [
                a.old.removeprefix(f"{section}.").removesuffix(".*") for a in self.table if a.old.startswith(section)
            ]
            raise ConfigError(f"{section}.{name}: unknown key. {nearest(name, known)}")

    def _replaced(self, section: str) -> dict[str, tuple[str, ...]]:
        """Return the entries of `REPLACED` for the canonical sections of this program."""
        sections = REPLACED.get(section, {}).items()
        return {target: kept for target, kept in sections if target in self._canonical_sections}


def merge_layer(raw: dict[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """As `merge`, for translated layers of a configuration: naming another part drops the options of the base's."""
    layer = copy.deepcopy(dict(layer))
    for path, default in SELECTED.items():
        name = get(layer, f"{path}.name")
        if name is not None and snake_case(str(name)) != snake_case(str(get(raw, f"{path}.name") or default)):
            get(layer, path)[REPLACE] = True
    merged = merge(raw, layer)
    if get(layer, "data.mask_type") is not None and "mask" not in layer and isinstance(merged.get("mask"), list):
        # It names the masks of the base, too.
        merged["mask"] = [
            {key: value for key, value in mask.items() if key != "name"} if isinstance(mask, dict) else mask
            for mask in merged["mask"]
        ]
    return merged


def name_masks(raw: dict[str, Any], written: dict[str, str]) -> dict[str, Any]:
    """Give the entries of `mask` without a name that of V-JEPA's `data.mask_type`, and note that in `written`."""
    data, masks = raw.get("data"), raw.get("mask")
    name = data.pop("mask_type", None) if isinstance(data, dict) else None
    if name is not None and isinstance(masks, list):
        for index, mask in enumerate(masks):
            if isinstance(mask, dict) and "name" not in mask:
                written[f"mask.{index}.name"] = "data.mask_type"
        raw["mask"] = [{"name": name, **mask} if isinstance(mask, dict) else mask for mask in masks]
    return raw


def _section(layer: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the mapping at a dotted key. Missing mappings are created, and the name of a part becomes one."""
    node, keys = layer, path.split(".")
    for depth, key in enumerate(keys, start=1):
        value = node.get(key)
        if value is None:
            node[key] = {}
        elif isinstance(value, str):
            node[key] = {"name": value}
        elif not isinstance(value, dict):
            raise ConfigError(f"{'.'.join(keys[:depth])}: expected a mapping, got {value!r}")
        node = node[key]
    return node


@functools.cache
def _warn_once(old: str, new: str) -> None:
    logger.warning("%s is deprecated; use %s", old, new or "nothing in its place")
