"""YAML files into typed, checked options.

Each component's options stand beside it as a subclass of `Config`; a program's `Options` puts them together. A file
may name another in `base:` and then holds only what differs: mappings are merged key by key, all else is replaced.
"""

import difflib
import re
import typing
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
import yaml


class UserError(Exception):
    """What the user can mend; the message says how. Programs end with it instead of a traceback."""


class ConfigError(UserError):
    """A configuration that cannot be used. The message names the file, the path of the key, and the remedy."""


class Config(pydantic.BaseModel):
    """Options of a component: typed, read-only; unknown keys and wrong types are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


# YAML has lists only, so a fixed-length range is written as a list there.
Pair = Annotated[tuple[float, float], pydantic.Field(strict=False)]
Triple = Annotated[tuple[float, float, float], pydantic.Field(strict=False)]

Schema = TypeVar("Schema", bound=Config)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as a string; configurations of this field mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load(fname: str | Path, overrides: typing.Sequence[str], schema: type[Schema]) -> Schema:
    """Read `fname`, apply `key.path=value` overrides, and check the result against `schema`.

    Raises ConfigError when a file is missing or no YAML, a key is unknown, a type is wrong, or values
    do not go together.
    """
    return check(read(fname, overrides), schema, fname)


def read(fname: str | Path, overrides: typing.Sequence[str] = ()) -> dict[str, Any]:
    """The raw mapping of `fname` with its bases merged and `key.path=value` overrides applied."""
    raw = _read_with_bases(Path(fname), seen=())
    for override in overrides:
        _override(raw, override)
    return raw


def check(raw: dict[str, Any], schema: type[Schema], fname: str | Path) -> Schema:
    """Turn a raw mapping into `schema`; every error at once, each with its key's path and the nearest valid key."""
    try:
        return check_part(raw, schema)
    except ConfigError as error:
        raise ConfigError(f"{fname}: problem in the configuration\n{error}") from None


def check_part(raw: dict[str, Any], schema: type[Schema], at: str = "") -> Schema:
    """As `check`, for the part of a file at key path `at` whose schema another key decides, such as a mask."""
    try:
        return schema.model_validate(raw)
    except pydantic.ValidationError as error:
        raise ConfigError("\n".join(_explain(e, schema, at) for e in error.errors())) from None


def dump(config: Config) -> str:
    """The resolved configuration as YAML; `load` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def nearest(name: str, valid: typing.Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of the `valid` names, else the list of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Valid: {', '.join(valid)}."


def _read_with_bases(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base: files name each other in a circle; remove one of the base: lines")
    if not path.is_file():
        raise ConfigError(f"{path}: no such file" + (f" (named as base: in {seen[-1]})" if seen else ""))
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(raw).__name__}")
    raw = _unshared(raw)
    base = raw.pop("base", None)
    if base is None:
        return raw
    return merge(_read_with_bases(path.parent / base, (*seen, path.resolve())), raw)


def _unshared(node: Any) -> Any:
    """YAML's `*alias` is the very object of its `&anchor`; as copies, an override changes one of them alone."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on it: mappings key by key, everything else replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"'{override}': an override is written key.path=value, as in optimization.lr=1e-3")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"'{override}': the value is not valid YAML: {error}") from None
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


def _explain(error: Any, schema: type[Config], at: str) -> str:
    location = [part for part in error["loc"] if not _is_union_tag(part)]
    key = ".".join(filter(None, [at, *(str(part) for part in location)])) or "(whole file)"
    if error["type"] == "extra_forbidden":
        parent = _schema_at(schema, location[:-1])
        return f"  {key}: unknown key. {nearest(str(location[-1]), parent.model_fields if parent else ())}"
    if error["type"] == "missing":
        return f"  {key}: required, but not given"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if error["type"] == "value_error":
        return f"  {key}: {message}"
    return f"  {key}: {message}, got {error['input']!r}"


def _is_union_tag(part: Any) -> bool:
    """Pydantic puts the tried member of a union (`list[str]`, `function-after[...]`) into the location."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "none"))


def _schema_at(schema: type[Config], location: list) -> type[Config] | None:
    """The options class that stands at a key's path."""
    found: Any = schema
    for part in location:
        if part not in found.model_fields:  # a place in a list or dict of sections
            continue
        found = _config_in(found.model_fields[part].annotation)
        if found is None:
            return None
    return found


def _config_in(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    for argument in typing.get_args(annotation):
        if found := _config_in(argument):
            return found
    return None
