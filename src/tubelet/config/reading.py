"""Read YAML files with their bases and overrides, and check them."""

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from tubelet.config import addresses, shipped
from tubelet.config.base import Config, ConfigError, nearest
from tubelet.config.merging import merge
from tubelet.config.registry import PartField
from tubelet.config.translation import Translation, merge_layer, name_masks, program_of
from tubelet.config.yaml_files import parse_yaml, read_yaml

__all__ = ["check", "check_part", "check_variant", "dump", "load", "merge", "read"]

Schema = TypeVar("Schema", bound=Config)
Result = TypeVar("Result")


class Raw(dict):
    """A configuration as read, with canonical keys.

    Attributes:
        written: Canonical path -> path in the file, where a key has an old name there.
    """

    written: Mapping[str, str] = {}


def load(fname: str | Path, overrides: Sequence[str], schema: type[Schema]) -> Schema:
    """Read `fname`, apply `key.path=value` overrides, and check the result against `schema`.

    Raises:
        ConfigError: A file is missing or not valid YAML, a key is unknown, a type is wrong, or values are incompatible.
    """
    return check(read(fname, overrides), schema, fname)


def read(fname: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the mapping of `fname` with its bases merged, `key.path=value` overrides applied, and canonical keys."""
    layers = list(_layers(shipped.find(fname), seen=()))
    parsed = [_parse(override) for override in overrides]
    program = None
    for layer in (*(layer for _, layer in layers), {key: value for _, key, value in parsed}):
        program = program_of(layer) or program
    translation = Translation(program)
    raw: dict[str, Any] = {}
    for file, layer in layers:
        raw = merge_layer(raw, _naming(file, translation.layer, layer))
    for override, path, value in parsed:
        if (translated := _naming(f"'{override}'", translation.override, path, value)) is not None:
            raw = merge_layer(raw, translated)
        else:
            _override(raw, override, path, value)
            translation.forget(path)
            if path == "data.mask_type":
                raw = merge_layer(raw, {"data": {"mask_type": value}})
    result = Raw(name_masks(raw, translation.written))
    result.written = translation.written
    return result


def _naming(where: object, function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function; prefix the message of its ConfigError with `where`."""
    try:
        return function(*arguments)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def check(raw: Mapping[str, Any], schema: type[Schema], fname: str | Path) -> Schema:
    """Check a configuration, whose keys may be those of V-JEPA.

    Args:
        raw: The configuration, as from `read` or as a mapping in Python.
        schema: The options class.
        fname: Where it comes from, for messages.

    Raises:
        ConfigError: The message has all errors, each with the path of the key and the nearest valid one.
    """
    try:
        raw = raw if isinstance(raw, Raw) else _canonical(raw)
        _check_no_credentials(raw)
        return check_part(raw, schema)
    except ConfigError as error:
        raise ConfigError(f"{fname}: problem in the configuration\n{error}") from None


def check_part(raw: Mapping[str, Any], schema: type[Schema], at: str = "") -> Schema:
    """As `check`, for the part of a configuration at key path `at`."""
    try:
        return schema.model_validate(raw)
    except pydantic.ValidationError as error:
        lines = dict.fromkeys(_explain(e, schema, raw, at) for e in error.errors())
        raise ConfigError("\n".join(lines)) from None


def check_variant(raw: Mapping[str, Any], schema: type[Schema], at: str) -> Schema:
    """As `check_part`, for a validator that checks options which differ from the common ones in the keys below `at`.

    Messages name keys of the whole, so all of them get the prefix `at`.

    Raises:
        ValueError: The message has all errors, a line each.
    """
    try:
        return check_part(raw, schema)
    except ConfigError as error:
        lines = str(error).removeprefix("  ").split("\n  ")
        raise ValueError("\n  ".join(f"{at}.{line}" for line in lines)) from None


def _check_no_credentials(node: Any, key: str = "") -> None:
    """Raise ConfigError where a value is an address with credentials: configurations are written to run folders."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            _check_no_credentials(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            _check_no_credentials(value, f"{key}.{index}")
    elif isinstance(node, str) and addresses.has_credentials(node):
        raise ConfigError(
            f"  {key}: {addresses.public(node)}: the address has a password or a query, which may hold a signature, "
            "and would be written to config.yaml. Put it into a list file, or give the credentials in the environment"
        )


def _canonical(mapping: Mapping[str, Any]) -> Raw:
    translation = Translation(program_of(mapping), quiet=True)
    raw = Raw(name_masks(merge_layer({}, translation.layer(mapping)), translation.written))
    raw.written = translation.written
    return raw


def dump(config: Config) -> str:
    """Return the resolved configuration as YAML; `load` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _layers(path: Path, seen: tuple[Path, ...]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a file and its bases with their mappings, the innermost base first."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: files name each other in a circle; remove one of the base: lines")
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(raw).__name__}")
    base = raw.pop("base", None)
    if base is not None:
        yield from _layers(_base(path, base), (*seen, path.resolve()))
    yield path, raw


def _base(path: Path, base: str) -> Path:
    """Return the file that `path` names as its base: relative to its folder, or a shipped configuration."""
    beside = path.parent / base
    return beside if beside.is_file() else shipped.look_up(base, f"named as base: in {path}")


def _parse(override: str) -> tuple[str, str, Any]:
    """Return an override, its path and its value."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"'{override}': an override is written key.path=value, as in optimization.lr=1e-3")
    return override, path, parse_yaml(text, f"'{override}'")


def _override(raw: dict[str, Any], override: str, path: str, value: Any) -> None:
    node: Any = raw
    *parents, last = path.split(".")
    for key in parents:
        if isinstance(node, list):
            node = node[_list_index(override, key, node)]
        elif isinstance(node, dict):
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
        if not isinstance(node, dict | list):
            raise ConfigError(f"'{override}': '{key}' is a single value, it has no key below it")
    if isinstance(node, list):
        node[_list_index(override, last, node)] = value
    else:
        node[last] = value


def _list_index(override: str, key: str, node: list) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"'{override}': '{key}' is no index of a list of {len(node)}; valid: 0 to {len(node) - 1}")
    return int(key)


def _explain(error: Any, schema: type[Config], raw: Any, at: str) -> str:
    location = [part for part in error["loc"] if not _is_union_tag(part)]
    key = _as_written([str(part) for part in location], getattr(raw, "written", {}))
    key = ".".join(filter(None, [at, key]))
    if error["type"] == "extra_forbidden":
        parent = _schema_at(schema, location[:-1], raw)
        return f"  {key}: unknown key. {nearest(str(location[-1]), parent.model_fields if parent else ())}"
    if error["type"] == "missing":
        return f"  {key}: required, but not given"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if error["type"] == "value_error":
        return f"  {key}: {message}" if key else f"  {message}"  # without a key, the message names those that conflict
    return f"  {key}: {message}, got {error['input']!r}"


def _as_written(location: list[str], written: Mapping[str, str]) -> str:
    """Return a key's path with the name that it has in the file."""
    for length in range(len(location), 0, -1):
        if (path := ".".join(location[:length])) in written:
            return ".".join([written[path], *location[length:]])
    return ".".join(location)


def _is_union_tag(part: Any) -> bool:
    """Pydantic puts the tried member of a union (`list[str]`, `function-after[...]`) into the location."""
    names = ("str", "int", "float", "bool", "none", "constrained-int", "constrained-float")
    return isinstance(part, str) and ("[" in part or part in names)


def _schema_at(schema: type[Config], location: list, raw: Any) -> type[Config] | None:
    """Return the options class at a key's path, which for a part depends on the name in `raw`."""
    current: type[Config] | None = schema
    types: list[Any] = []
    for part in location:
        if current is not None and part in current.model_fields:
            field = current.model_fields[part]
            types = [field.annotation, *field.metadata]
        # Else an index of a list, or a name in a mapping of sections.
        raw = raw[part] if isinstance(raw, list) else raw.get(part) if isinstance(raw, Mapping) else None
        current = _config_in(types, raw)
    return current


def _config_in(types: Sequence[Any], raw: Any) -> type[Config] | None:
    """Return the options class among the types of a field; None for a list of parts."""
    for kind in sorted(types, key=lambda kind: not isinstance(kind, PartField)):
        if isinstance(kind, PartField):
            if not isinstance(raw, Mapping):
                return None
            try:
                return kind.locate(kind.with_name(raw))[0]
            except (ConfigError, ValueError):
                return None
        if isinstance(kind, type) and issubclass(kind, Config):
            return kind
        arguments = [*typing.get_args(kind), *getattr(kind, "__metadata__", ())]
        if nested := _config_in(arguments, raw):
            return nested
    return None
