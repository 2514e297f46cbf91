"""Reference of the options of a program, with the documentation that stands beside them in the code."""

import builtins
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic.fields import FieldInfo

from tubelet.config import documentation
from tubelet.config.base import Config
from tubelet.config.factories import Factory, FactoryOptions, options_class
from tubelet.config.registry import Module, PartField

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # attributes of pydantic's constraints


@dataclass(frozen=True)
class Option:
    """An option of a program.

    Attributes:
        key: Path in the file; `<i>` is an index of a list, `<name>` a key of a mapping that the user chooses.
        type: Its type as text, e.g. `int >= 1 | null`.
        required: Whether it must be given.
        default: The default as JSON types; None for sections.
        text: Its documentation.
        part: Where it selects a part such as an objective: the kind of part, see `parts`.
        section: The options class of a section or of the part; its options follow.
    """

    key: str
    type: str
    required: bool
    default: Any
    text: str
    part: PartField | None = None
    section: builtins.type[Config] | None = None


def options(schema: type[Config], raw: Any = None, at: str = "") -> list[Option]:
    """Return the options of a class, those of its sections and those of the parts that it selects.

    Args:
        schema: The options class of a program, a section or a part.
        raw: A configuration, as from `config.read`, which names the parts; else each has its default name.
        at: Path of the keys in the file.
    """
    return list(_options(schema, raw if isinstance(raw, Mapping) else {}, at))


def parts(part: PartField) -> dict[str, type[Config]]:
    """Return the options classes of all parts of a kind that the package has, by name."""
    if isinstance(part, Factory):
        return {name: options_class(part, factory) for name, factory in sorted(part.available().items())}
    assert isinstance(part, Module)
    return {name: part.locate({"name": name})[0] for name in part.available()}


def as_text(rows: list[Option], width: int = 100) -> str:
    """Return the options for a terminal: `key: type = default`, and the text below."""
    lines = []
    for row in rows:
        default = "" if row.required or row.section is not None else f" = {as_yaml(row.default)}"
        lines.append(f"{row.key}: {row.type}{default}{'  (required)' if row.required else ''}")
        lines += textwrap.wrap(row.text, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


def own_options(schema: type[Config], raw: Mapping[str, Any] | None = None, at: str = "") -> Iterator[Option]:
    """Yield the options of a class itself; arguments as those of `options`."""
    texts, raw = documentation.of_options(schema), raw or {}
    for name, field in schema.model_fields.items():
        given = raw.get(name)
        part, section, path = nested(field)
        default = None if field.is_required() else _default(field)
        chosen = schema_of(part, given if given is not None else default) if part and not path else section
        text = texts.get(name) or (documentation.summary(chosen) if chosen else "")
        kind = "section" if section and not path else _type(field.annotation, field.metadata)
        required = field.is_required()
        if name == "name" and issubclass(schema, FactoryOptions):  # given where the part is selected
            required, default = False, given or schema.part.default
        yield Option(f"{at}.{name}" if at else name, kind, required, default, text, part, chosen)


def _options(schema: type[Config], raw: Mapping[str, Any], at: str) -> Iterator[Option]:
    for option, (name, field) in zip(own_options(schema, raw, at), schema.model_fields.items(), strict=True):
        yield option
        given, (part, section, path) = raw.get(name), nested(field)
        if option.section and not path:
            yield from _options(option.section, given if isinstance(given, Mapping) else {}, option.key)
            continue
        for place, value in _entries(path, given):
            entry = schema_of(part, value) if part else section
            if entry:
                yield from _options(entry, value if isinstance(value, Mapping) else {}, f"{option.key}.{place}")


def _entries(path: str, given: Any) -> Iterator[tuple[str, Any]]:
    """Yield what stands for the entries of a list or mapping of sections: one of each part that `given` names."""
    values = given if isinstance(given, list) else list(given.values()) if isinstance(given, Mapping) else []
    named = {str(value.get("name") if isinstance(value, Mapping) else value): value for value in values}
    if path:
        yield from ((path, value) for value in (named.values() if len(named) > 1 else values[:1] or [None]))


def schema_of(part: PartField, raw: Any) -> type[Config] | None:
    """Return the options class of the part that `raw` names, by default that of the kind; None where it has none."""
    mapping = part.with_name(raw if raw is not None else {}) if raw is not None or part.default else {}
    return part.locate(mapping)[0] if mapping else None


def nested(field: FieldInfo) -> tuple[PartField | None, type[Config] | None, str]:
    """Return the kind of part or the options class of a field; `<i>` or `<name>` where it has several of them."""
    for item in field.metadata:
        if isinstance(item, PartField):
            return item, None, ""
    return _nested_type(field.annotation, "")


def _nested_type(annotation: Any, path: str) -> tuple[PartField | None, type[Config] | None, str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for item in arguments[1:]:
            if isinstance(item, PartField):
                return item, None, path
        return _nested_type(arguments[0], path)
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return None, annotation, path
    if origin in (Union, types.UnionType):
        inner = [_nested_type(argument, path) for argument in arguments]
        return next((each for each in inner if each[0] or each[1]), (None, None, ""))
    if origin in (list, tuple) and arguments:
        return _nested_type(arguments[0], "<i>")
    if origin is dict:
        return _nested_type(arguments[1], "<name>")
    return None, None, ""


def _default(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value


# ---------------------------------------------------------------- types


def _type(annotation: Any, metadata: Any = ()) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    bounds = _bounds(metadata)
    for item in metadata:
        if isinstance(item, PartField):
            return "name | {name: …, options}"
    if origin is Annotated:
        return _type(arguments[0], arguments[1:]) + bounds
    if origin is Literal:
        return " | ".join(as_yaml(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        parts = [_type(argument) for argument in arguments]
        numeric = [index for index, part in enumerate(parts) if part.split()[0] in ("int", "float")]
        if bounds and numeric:
            parts[numeric[0]] += bounds
        return " | ".join(parts)
    if origin is tuple:
        inner = [_type(argument) for argument in arguments if argument is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in arguments else f"[{', '.join(inner)}]"
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return "section"
    names = {type(None): "null", Any: "any", bool: "true | false", str: "text"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation))) + bounds


def _bounds(metadata: Any) -> str:
    """Return the bounds among metadata, also those inside of `Field(ge=1)`, e.g. ` >= 0 <= 1`."""
    items = [one for item in metadata for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return "".join(
        f" {sign} {getattr(item, name)}" for item in items for name, sign in _BOUNDS.items() if hasattr(item, name)
    )


def as_yaml(value: Any) -> str:
    """Return a value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
