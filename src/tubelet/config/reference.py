"""Reference of the options of a program, with the documentation that stands beside them in the code.

The text of an option is the string below it in its class, or its entry in the section `Args:` of the docstring. Options
of factories are documented where the argument of the constructor is.
"""

import ast
import builtins
import functools
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import yaml
from pydantic.fields import FieldInfo

from tubelet.config.base import Config
from tubelet.config.registry import Factory, FactoryOptions, Module, PartField, options_class, product

_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # attributes of pydantic's constraints


_COMMON = {"name": "Name of the part.", "app": "Program of `app`.", "eval_name": "Program of `evals`."}


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
    texts, raw = documentation(schema), raw or {}
    for name, field in schema.model_fields.items():
        given = raw.get(name)
        part, section, path = nested(field)
        default = None if field.is_required() else _default(field)
        chosen = schema_of(part, given if given is not None else default) if part and not path else section
        text = texts.get(name) or (_summary(chosen) if chosen else "")
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


# ---------------------------------------------------------------- documentation


@functools.cache
def documentation(schema: type[Config]) -> dict[str, str]:
    """Return the text of each option of a class that has one."""
    if issubclass(schema, FactoryOptions):
        return _of_factory(schema)
    texts: dict[str, str] = {}
    for cls in schema.__mro__:
        if issubclass(cls, Config):
            texts = {**arguments_section(cls.__dict__.get("__doc__")), **_attribute_docstrings(cls), **texts}
    for name, text in _COMMON.items():
        texts.setdefault(name, text)
    return {name: text for name, text in texts.items() if name in schema.model_fields}


def _of_factory(schema: type[FactoryOptions]) -> dict[str, str]:
    function: Any = schema.factory
    while isinstance(function, functools.partial):
        function = function.func
    texts: dict[str, str] = {}
    built = product(function)
    sources = list(dict.fromkeys([function, *(built.__mro__ if built else ())]))
    for source in sources:
        if source.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        docstring = source.__doc__ or ""
        texts = {**arguments_section(docstring), **texts}
        if same := re.search(r"arguments are those of `(\w+)`", docstring):
            sources.append(getattr(sys.modules[source.__module__], same[1]))
    renamed = {schema.part.rename.get(argument, argument): text for argument, text in texts.items()}
    return {"name": f"Name among the {schema.part.kind}.", **renamed}


def arguments_section(docstring: str | None) -> dict[str, str]:
    """Return the entries of the section `Args:` or `Attributes:` of a Google-style docstring."""
    texts: dict[str, str] = {}
    names: list[str] = []
    inside = False
    for line in inspect.cleandoc(docstring or "").split("\n"):
        if line and not line.startswith(" "):
            inside = line in ("Args:", "Attributes:")
            names = []
        elif inside and (entry := re.match(r" {4}(\w[\w, *`]*?)(?: \([^)]*\))?: (.*)", line)):
            names = [name.strip(" *`") for name in entry[1].split(",")]
            texts.update(dict.fromkeys(names, entry[2]))
        elif inside and names and line.strip():
            texts.update({name: f"{texts[name]} {line.strip()}" for name in names})
    return texts


def _summary(schema: type[Config]) -> str:
    """Return the first paragraph of a class's docstring."""
    docstring = schema.__dict__.get("__doc__") or ""
    return " ".join(inspect.cleandoc(docstring).split("\n\n")[0].split())


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """Return the strings below the attributes of a class."""
    node: Any = _module_tree(cls.__module__)
    for name in cls.__qualname__.split("."):
        classes = [child for child in node.body if isinstance(child, ast.ClassDef) and child.name == name]
        if not classes:  # made at run time
            return {}
        node = classes[-1]
    texts = {}
    for statement, below in zip(node.body, node.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and _is_string(below):
            texts[statement.target.id] = " ".join(inspect.cleandoc(below.value.value).split())
    return texts


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@functools.cache
def _module_tree(module: str) -> ast.Module:
    try:
        return ast.parse(inspect.getsource(sys.modules[module]))
    except OSError:  # no file, such as in an interactive session
        return ast.Module([], [])
