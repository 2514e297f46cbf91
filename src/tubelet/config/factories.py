"""Parts that a callable with annotated arguments builds, such as encoders; see `tubelet.config.registry`."""

import ast
import collections.abc
import functools
import importlib
import importlib.abc
import importlib.util
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Union

import pydantic

from tubelet.config.base import Config, ConfigError, nearest, snake_case
from tubelet.config.registry import PartField, PartOptions, entry_point_names, entry_points, import_module

# Arguments of constructors that programs set from the size of the clips.
SIZES = ("img_size", "num_frames", "patch_size", "tubelet_size", "height", "width")


class UnknownModule(ConfigError):
    """An unknown value of the key `module` of a factory part."""

    key = "module"


class FactoryOptions(PartOptions):
    """Options of a factory part: its name, and the arguments of its constructor. Made by `options_class`."""

    part: ClassVar["Factory"]
    factory: ClassVar[Callable[..., Any]]

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for the factory. Options that are left to the program (None) are missing."""
        names = {option: argument for argument, option in self.part.rename.items()}
        values = {names.get(name, name): getattr(self, name) for name in type(self).model_fields if name != "name"}
        return {name: value for name, value in values.items() if name not in self.part.inherit or value is not None}

    def build(self, **context: Any) -> Any:
        """Call the factory with these options and with those arguments of `context` that it accepts.

        Options win over `context`, which gives sizes and what an option leaves open.
        """
        accepted = inspect.signature(self.factory).parameters
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in accepted.values()):
            context = {name: value for name, value in context.items() if name in accepted}
        return self.factory(**{**context, **self.arguments()})

    def __reduce__(self) -> tuple[Any, ...]:
        # The class is made at run time; another process makes it again.
        return self.part.parse, (self.model_dump(exclude_unset=True),)


@dataclass(frozen=True)
class Factory(PartField):
    """A part that is built by a callable with annotated arguments; see `options_class`.

    A name is looked up among the public names that the files of `package` define at their top level, among the entry
    points of the group `tubelet.<kind>`, or it is dotted: `my_package.my_module.my_factory`. `module` beside `name`
    narrows the search: a file of the package or a dotted module.

    Args:
        kind: Name of the kind in messages and of the group of entry points.
        package: Package whose files define the factories.
        marker: Class attribute that tells the classes of this kind from others.
        default: Name of the part where none is given.
        skip: Arguments that the program sets, besides the sizes of the clips.
        rename: Option names that differ from those of the arguments: argument -> option.
        inherit: Options that may be None, which leaves the value to the program.
    """

    kind: str
    package: str
    marker: str
    default: str | None = None
    skip: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict, hash=False)
    inherit: tuple[str, ...] = ()
    located_by: ClassVar[tuple[str, ...]] = ("name", "module")

    def find(self, name: str, module: str | None = None) -> Callable[..., Any]:
        """Return the factory of this name. Raises ConfigError where there is none, or more than one."""
        return self._locate(name, module)[1]

    def available(self) -> dict[str, Callable[..., Any]]:
        """Return all factories of the package by name. This imports all of its files."""
        return {name: value for file in _files(self.package) for name, value in self._parts_of(file).items()}

    def parse(self, raw: Any) -> "FactoryOptions":
        options = super().parse(raw)
        assert isinstance(options, FactoryOptions)
        return options

    def locate(self, raw: Mapping[str, Any]) -> tuple[type[Config], str]:
        name, factory = self._locate(raw["name"], raw.get("module"))
        return options_class(self, factory), name

    def _locate(self, name: str, module: str | None) -> tuple[str, Callable[..., Any]]:
        """Return the name that finds the factory without `module`, and the factory."""
        if module is not None:
            return self._locate_in(name, module)
        if "." in name:
            parent, _, attribute = name.rpartition(".")
            return name, self._attribute(import_module(parent), attribute)
        files = [file for file in _files(self.package) if name in _top_level_names(file)]
        files = [file for file in files if self._is_part(getattr(importlib.import_module(file), name))]
        if len(files) > 1:
            raise ConfigError(f"'{name}' is defined in {' and '.join(files)}; add module: with one of these")
        if files:
            return name, getattr(importlib.import_module(files[0]), name)
        for entry_point in entry_points(self.kind):
            if entry_point.name == name:
                return name, self._check(entry_point.load(), name)
        raise ConfigError(
            f"'{name}': not among the {self.kind}. {nearest(name, [*self.available(), *entry_point_names(self.kind)])}"
        )

    def _locate_in(self, name: str, module: str) -> tuple[str, Callable[..., Any]]:
        file = f"{self.package}.{snake_case(module)}"
        if "." not in module and not self._parts_of(file):
            files = [other.rpartition(".")[2] for other in _files(self.package) if self._parts_of(other)]
            raise UnknownModule(f"'{module}': no {self.kind} in such a file. {nearest(snake_case(module), files)}")
        path = module if "." in module else file
        factory = self._attribute(import_module(path), name)
        in_package = [other for other in _files(self.package) if name in _top_level_names(other)]
        return (name if in_package == [path] else f"{path}.{name}"), factory

    def _parts_of(self, file: str) -> dict[str, Callable[..., Any]]:
        """Return the factories that a file of the package defines."""
        if file not in _files(self.package):
            return {}
        values = {name: getattr(importlib.import_module(file), name) for name in _top_level_names(file)}
        return {name: value for name, value in values.items() if not inspect.isclass(value) and self._is_part(value)}

    def _attribute(self, module: ModuleType, name: str) -> Callable[..., Any]:
        if not hasattr(module, name):
            valid = [other for other in _top_level_names(module.__name__) if self._is_part(getattr(module, other))]
            raise ConfigError(f"'{name}': not in {module.__name__}. {nearest(name, valid)}")
        return self._check(getattr(module, name), name)

    def _check(self, factory: Any, name: str) -> Callable[..., Any]:
        if not self._is_part(factory):
            raise ConfigError(
                f"'{name}': not one of the {self.kind}: a class, or a function annotated to return one, with the class "
                f"attribute {self.marker}"
            )
        return factory

    def _is_part(self, value: Any) -> bool:
        return hasattr(product(value), self.marker)


def product(factory: Any) -> type | None:
    """Return the class of what a factory builds: a class, a function annotated with one, or a partial of either."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    if isinstance(factory, types.FunctionType):
        factory = typing.get_type_hints(factory).get("return")
    return factory if inspect.isclass(factory) else None


@functools.cache
def _files(package: str) -> tuple[str, ...]:
    """Return the modules of a package; of a plain module itself."""
    module = importlib.import_module(package)
    if not hasattr(module, "__path__"):
        return (package,)
    return tuple(f"{package}.{info.name}" for info in pkgutil.iter_modules(module.__path__))


@functools.cache
def _top_level_names(module: str) -> tuple[str, ...]:
    """Return the public names that a module defines, as opposed to those that it imports, without importing it."""
    spec = importlib.util.find_spec(module)
    loader = spec.loader if spec is not None else None
    source = loader.get_source(module) if isinstance(loader, importlib.abc.InspectLoader) else None
    names = []
    for node in ast.parse(source or "").body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return tuple(name for name in names if not name.startswith("_"))


@functools.cache
def options_class(part: Factory, factory: Callable[..., Any]) -> type[FactoryOptions]:
    """Return the options class of a factory, derived from the signature of its constructor.

    Each argument becomes an option of the same type and default; what a `functools.partial` binds is the default.
    Arguments that the program sets (sizes, `part.skip`) and those that YAML cannot express, such as callables, are no
    options.

    Args:
        part: The kind of the factory.
        factory: A class, a function, or a partial of either.
    """
    function = factory
    while isinstance(function, functools.partial):
        function = function.func
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variadic or name in SIZES or name in part.skip:
            continue
        annotation = _yaml_type(hints.get(name, Any))
        if annotation is None:
            continue
        option = part.rename.get(name, name)
        if option in ("name", "module"):
            raise TypeError(f"{factory}: the argument `{name}` cannot be an option, as `{option}` names the part")
        default = ... if parameter.default is parameter.empty else parameter.default
        if option in part.inherit:
            annotation, default = annotation | None, None
        fields[option] = (annotation, default)
    schema = pydantic.create_model(function.__name__ + "Options", __base__=FactoryOptions, **fields)
    schema.part, schema.factory = part, staticmethod(factory)
    return schema


def _yaml_type(annotation: Any) -> Any:
    """Return the type as the annotation of an option: what YAML can express of it, with sequences as tuples; or None.

    YAML has lists only, so a strict check would refuse them where a tuple is expected.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (Any, bool, int, float, str, type(None)) or origin is Literal:
        return annotation
    if origin is Annotated:
        inner = _yaml_type(arguments[0])
        return None if inner is None else Annotated[(inner, *arguments[1:])]
    if origin in (Union, types.UnionType):
        members = [member for member in map(_yaml_type, arguments) if member is not None]
        if all(member is type(None) for member in members):
            return None
        return functools.reduce(lambda a, b: a | b, members)
    if origin in (tuple, list, collections.abc.Sequence):
        inner = [member if member is Ellipsis else _yaml_type(member) for member in arguments]
        if None in inner:
            return None
        inner = inner if origin is tuple else [*inner, Ellipsis]
        return Annotated[tuple.__class_getitem__(tuple(inner)), pydantic.Field(strict=False)]
    if origin in (dict, collections.abc.Mapping):
        return annotation
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return annotation
    return None
