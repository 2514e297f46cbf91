"""Compare the configuration of a run with that of its continuation."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic

from tubelet.config.base import RESUME_IGNORED, RESUME_NULL_MATCHES, Config, ConfigError, Marker
from tubelet.config.translation import to_canonical

Path = tuple[str, ...]


def marked(options: Config, marker: Marker) -> Iterator[Path]:
    """Yield the key paths of the options and sections whose fields have a marker."""
    for name, field in type(options).model_fields.items():
        if marker in field.metadata:
            yield (name,)
        else:
            yield from ((name, *path) for path in _marked_below(getattr(options, name), marker))


def compared(options: Config) -> dict[str, Any]:
    """Return the values, by dotted key, that may not differ when a run is continued."""
    ignored = set(marked(options, RESUME_IGNORED))
    return {
        ".".join(path): value
        for path, value in _leaves(options.model_dump(mode="json"))
        if not _starts_with_any(path, ignored)
    }


def differences(earlier: Mapping[str, Any], options: Config) -> list[str]:
    """Compare a run's configuration with that of its continuation.

    Args:
        earlier: Content of the run's `config.yaml`, which may be of an earlier version: its keys are translated, and
            options that it does not have get their defaults.
        options: Options of the continuation.

    Returns:
        One line for each key that differs, except for those with the marker `RESUME_IGNORED`.
    """
    raw = to_canonical(earlier)
    new = compared(options)
    ignored = set(marked(options, RESUME_IGNORED))
    try:
        parsed, removed = _parse(raw, type(options))
        old = compared(parsed) | _leaves_but(removed, ignored)
    except (pydantic.ValidationError, ConfigError):
        # The file is of a version whose options are others: all that it says has to be the same.
        old = _leaves_but(raw, ignored)
    null_matches = {".".join(path) for path in marked(options, RESUME_NULL_MATCHES)}
    return [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not (key in null_matches and None in (old.get(key), new.get(key)))
    ]


def _parse(raw: Mapping[str, Any], schema: type[Config]) -> tuple[Config, dict[str, Any]]:
    """Return a run's options, and the keys of its configuration that are no options of this version, by dotted path."""
    try:
        return schema.model_validate(raw), {}
    except pydantic.ValidationError as error:
        unknown = [e["loc"] for e in error.errors() if e["type"] == "extra_forbidden"]
        if not unknown:
            raise
    known, removed = _without(raw, unknown)
    return schema.model_validate(known), removed


def _without(raw: Mapping[str, Any], keys: list[tuple[int | str, ...]]) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """Split off keys, at the locations of pydantic, which also hold names of types; return the rest and the keys."""
    known, removed = copy.deepcopy(dict(raw)), {}
    for location in keys:
        node: Any = known
        parent: Any = None
        path: list[Any] = []
        part: Any
        for part in location:
            if isinstance(node, Mapping) and part in node or isinstance(node, list) and isinstance(part, int):
                path.append(part)
                parent, node = node, node[part]
        if path and path[-1] == location[-1]:
            removed[".".join(map(str, path))] = parent.pop(path[-1])
    return known, removed


def _leaves_but(raw: Mapping[str, Any], ignored: set[Path]) -> dict[str, Any]:
    """Return the values of `raw`, whose keys may be dotted, without those of the options `ignored`."""
    leaves = ((tuple(".".join(path).split(".")), value) for path, value in _leaves(raw) if path)
    return {".".join(path): value for path, value in leaves if not _starts_with_any(path, ignored)}


def _marked_below(value: Any, marker: Marker) -> Iterator[Path]:
    if isinstance(value, Config):
        yield from marked(value, marker)
    elif isinstance(value, Mapping):
        yield from ((str(key), *path) for key, below in value.items() for path in _marked_below(below, marker))
    elif isinstance(value, list | tuple):
        yield from ((str(i), *path) for i, below in enumerate(value) for path in _marked_below(below, marker))


def _leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield the path and the value of everything that is no section."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(node, list) and node and isinstance(node[0], Mapping):
        for index, value in enumerate(node):
            yield from _leaves(value, (*path, str(index)))
    else:
        yield path, node


def _starts_with_any(path: Path, prefixes: set[Path]) -> bool:
    return any(path[:length] in prefixes for length in range(1, len(path) + 1))
