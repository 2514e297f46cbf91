"""Merge configurations, and read and write nested mappings by dotted keys."""

from collections.abc import Mapping
from typing import Any

REPLACE = "replace"
"""Key of a mapping that replaces that of the base file: true, or (internally) a tuple of the names to keep."""


class _Delete:
    def __repr__(self) -> str:
        return "DELETE"

    def __deepcopy__(self, memo: Any) -> "_Delete":
        return self


DELETE = _Delete()
"""Value of a key that removes it from the base file's mapping."""


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


def get(node: Any, path: str, default: Any = None) -> Any:
    """Return the value at a dotted key, or the default where there is none."""
    for key in path.split("."):
        if not isinstance(node, Mapping) or key not in node:
            return default
        node = node[key]
    return node


def put(node: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted key; mappings above it are created."""
    *parents, last = path.split(".")
    for key in parents:
        if not isinstance(node.get(key), dict):
            node[key] = {}
        node = node[key]
    node[last] = value


def pop(node: dict[str, Any], path: str) -> Any:
    """Remove a dotted key, which has to be there, and return its value."""
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    return node.pop(last)
