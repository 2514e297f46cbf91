"""Documentation of options, from the code that declares them.

The text of an option is the string below it in its class, or its entry in the section `Args:` of the docstring. Options
of factories are documented where the argument of the constructor is.
"""

import ast
import functools
import inspect
import re
import sys
from typing import Any

from tubelet.config.base import Config
from tubelet.config.factories import FactoryOptions, product

_COMMON = {"name": "Name of the part.", "app": "Program of `app`.", "eval_name": "Program of `evals`."}


@functools.cache
def of_options(schema: type[Config]) -> dict[str, str]:
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


def summary(schema: type[Config]) -> str:
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
