"""Reads options classes: the type, default and documentation of each option."""

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import pydantic_core
import yaml
from pydantic.fields import FieldInfo

from tubelet.config import Config
from tubelet.config.registry import PartField, product

LIMITS = (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"), ("multiple_of", "multiple of "))
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null", Any: "any value"}


@dataclass(frozen=True)
class Option:
    """An option of a class, as text in Markdown."""

    name: str
    kind: str
    default: str
    documentation: str


def options_of(schema: type[Config]) -> list[Option]:
    """Return the options of a class in the order of their declaration."""
    documented = documentation_of(schema)
    return [
        Option(name, _kind(field), _default(field), documented.get(name, ""))
        for name, field in schema.model_fields.items()
    ]


def sections_of(schema: type[Config], path: str = "") -> Iterator[tuple[str, type[Config]]]:
    """Yield the class and the classes of its sections, each with the dotted path of its key."""
    yield path, schema
    for name, field in schema.model_fields.items():
        for inner, suffix in _sections_in(field.annotation):
            yield from sections_of(inner, f"{path}.{name}{suffix}".lstrip("."))


def documentation_of(schema: type[Config]) -> dict[str, str]:
    """Return the documentation of options: strings below them, or the arguments in the docstring of the class.

    Several options followed by one string share it.
    """
    found: dict[str, str] = {}
    for base in reversed(schema.__mro__):
        if issubclass(base, Config) and base is not Config:
            found |= _arguments(base.__doc__) | _below_attributes(base)
    factory = getattr(schema, "factory", None)
    made = product(factory) if factory is not None else None
    for base in reversed(made.__mro__ if made is not None else ()):
        found |= _arguments(base.__doc__)
    renamed = getattr(getattr(schema, "part", None), "rename", {})
    return found | {option: found[argument] for argument, option in renamed.items() if argument in found}


def _below_attributes(schema: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(schema))
    except (OSError, TypeError):  # made at run time
        return {}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    names: list[str] = []
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found |= {name: _one_line(node.value.value) for name in names[-1:]}
    return found


def _arguments(docstring: str | None) -> dict[str, str]:
    """Return the section `Args` of a docstring in Google style."""
    match = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.cleandoc(docstring or ""), re.MULTILINE)
    if match is None:
        return {}
    entries = re.findall(r"^(\w+): (.*(?:\n(?:    .*|))*)", textwrap.dedent(match[1]), re.MULTILINE)
    return {name: _one_line(text) for name, text in entries}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _kind(field: FieldInfo) -> str:
    part = next((item for item in field.metadata if isinstance(item, PartField)), None)
    kind = _part(part) if part else describe(field.annotation)
    limits = [f"{sign}{getattr(item, key):g}" for item in field.metadata for key, sign in LIMITS if hasattr(item, key)]
    return ", ".join([kind, *limits])


def describe(annotation: Any) -> str:
    """Return the type of an option in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        part = next((item for item in arguments[1:] if isinstance(item, PartField)), None)
        return _part(part) if part else describe(arguments[0])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe, arguments)))
    if origin is tuple:
        return f"list of {describe(arguments[0])}" + ("" if Ellipsis in arguments else f" ({len(arguments)})")
    if origin is dict:
        return f"mapping to {describe(arguments[1])}"
    if origin is not None:
        return f"list of {describe(arguments[0])}" if arguments else "list"
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return "section"
    return NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _part(part: PartField) -> str:
    kind = part.kind.rpartition(".")[2]
    return f"[name or section](parts.md#{kind})"


def _sections_in(annotation: Any) -> Iterator[tuple[type[Config], str]]:
    """Yield the options classes in the type of an option, with what follows the key: nothing, an index or a name."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        if not any(isinstance(item, PartField) for item in arguments[1:]):
            yield from _sections_in(arguments[0])
    elif inspect.isclass(annotation) and origin is None and issubclass(annotation, Config):
        if annotation.model_fields and annotation.__name__ not in ("PartOptions", "FactoryOptions"):
            yield annotation, ""
    else:
        suffix = {dict: ".<name>", list: ".<index>"}.get(origin, "") if origin else ""
        for argument in arguments:
            for inner, further in _sections_in(argument):
                yield inner, suffix + further


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return ""  # its options have their own defaults
    if part := next((item for item in field.metadata if isinstance(item, PartField)), None):
        return f"`{part.default}`" if part.default else ""
    plain = pydantic_core.to_jsonable_python(value)
    return f"`{_one_line(yaml.safe_dump(plain, default_flow_style=True, width=10**6).removesuffix('...' + chr(10)))}`"
