"""Find pluggable parts by name, and check their options.

A part is selected by `{name: …, **its own options}`, or by its name alone. There are two kinds of parts:

- A `Module` part is a Python module with an options class, such as a mask or an objective. Its name is that of a file
  in `tubelet/<kind>`, of an entry point of the group `tubelet.<kind>`, or an importable module such as
  `my_package.my_module`.
- A `Factory` part is a callable that builds an `nn.Module`, such as `vit_large`. Its options are the annotated
  arguments of the constructor; see `options_class`.

Adding the file is the registration.
"""

import ast
import collections.abc
import functools
import importlib
import importlib.abc
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Union, cast

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from tubelet.config.base import Config, ConfigError, nearest, snake_case

# Arguments of constructors that programs set from the size of the clips.
SIZES = ("img_size", "num_frames", "patch_size", "tubelet_size", "height", "width")


# ---------------------------------------------------------------- modules


def find(kind: str, name: str) -> ModuleType:
    """Return the module of a part.

    Args:
        kind: Subpackage of tubelet, such as `masks`.
        name: File in `tubelet/<kind>` (`VideoDataset` and `video_dataset` are the same), entry point of the group
            `tubelet.<kind>`, or importable module.

    Raises:
        ConfigError: There is no such module. The message has the nearest name.
    """
    if "." in name:
        return _import(name)
    if snake_case(name) in available(kind):
        return importlib.import_module(f"tubelet.{kind}.{snake_case(name)}")
    for entry_point in _entry_points(kind):
        if entry_point.name == name:
            return entry_point.load()
    if name.isidentifier() and importlib.util.find_spec(name) is not None:
        return _import(name)
    raise ConfigError(_unknown(kind, name, available(kind) + _entry_point_names(kind)))


def available(kind: str) -> list[str]:
    """Return the names of the files in `tubelet/<kind>`."""
    package = importlib.import_module(f"tubelet.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def name_of(kind: str, provides: str) -> Any:
    """Return the type of a field that holds the name of a part whose module has the attribute `provides`."""
    part = Module(kind, provides)

    def check(name: str) -> str:
        try:
            return part.check_name(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    return Annotated[str, pydantic.AfterValidator(check)]


def _import(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"'{name}': not the name of a module; write it as in an import, my_package.my_module")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A missing import inside of the module is another error, and not to be hidden.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(f"'{name}': cannot be imported: {error}") from None
        raise


def _entry_points(kind: str) -> list[importlib.metadata.EntryPoint]:
    return list(importlib.metadata.entry_points(group=f"tubelet.{kind}"))


def _entry_point_names(kind: str) -> list[str]:
    return [entry_point.name for entry_point in _entry_points(kind)]


def _unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    return f"'{name}': not in tubelet/{kind.replace('.', '/')}. {nearest(snake_case(name), valid)}"


# ---------------------------------------------------------------- fields


class PartOptions(Config):
    """Options of a part."""

    name: str


class PartField:
    """Pydantic field type of a part: `Annotated[PartOptions, Module("masks", "MaskConfig")]`.

    A value is the name of a part or a mapping with the key `name` and the part's options. It is validated to an
    instance of the part's options class.
    """

    kind: str
    default: str | None
    located_by: ClassVar[tuple[str, ...]] = ("name",)

    def locate(self, raw: Mapping[str, Any]) -> tuple[type[Config], str]:
        """Return the options class of the part that `raw` names, and its canonical name.

        Raises ConfigError where there is no such part.
        """
        raise NotImplementedError

    def parse(self, raw: Any) -> PartOptions:
        """Check the options of a part: a name, a mapping, or the instance of an options class.

        Raises:
            pydantic.ValidationError: An option is unknown or invalid.
            ValueError: The part is unknown.
        """
        if isinstance(raw, Config):
            return cast(PartOptions, raw)
        raw = self.with_name(raw)
        try:
            schema, name = self.locate(raw)
        except ConfigError as error:
            key = getattr(error, "key", "name")
            raise _error_at(key, error, raw[key]) from None
        options = {key: value for key, value in raw.items() if key not in self.located_by}
        return cast(PartOptions, schema.model_validate({"name": name, **options}))

    def with_name(self, raw: Any) -> dict[str, Any]:
        """Return `raw` as a mapping that has a name."""
        raw = {"name": raw} if isinstance(raw, str) else raw
        if not isinstance(raw, Mapping):
            raise ValueError(f"expected the name of a part, or a mapping with its name and its options, got {raw!r}")
        raw = {"name": self.default, **raw} if raw.get("name") is None else dict(raw)
        if not isinstance(raw["name"], str):
            raise _error_at("name", "expected a name", raw["name"])
        return raw

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            self.parse,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda value, info: value.model_dump(mode=info.mode), info_arg=True
            ),
        )


def _error_at(key: str, message: object, given: Any) -> pydantic.ValidationError:
    error = PydanticCustomError("value_error", "{message}", {"message": str(message)})
    return pydantic.ValidationError.from_exception_data("part", [InitErrorDetails(type=error, loc=(key,), input=given)])


class UnknownModule(ConfigError):
    """An unknown value of the key `module` of a factory part."""

    key = "module"


@dataclass(frozen=True)
class Module(PartField):
    """A part that is a module with an options class; see the module's docstring.

    Args:
        kind: Subpackage of tubelet.
        options: Name of the options class in the module, which declares `name: str` besides its options.
        provides: Attribute that makes a module a part. By default `options`; where it is another one, the options
            class may be missing.
        default: Name of the part where none is given.
    """

    kind: str
    options: str = "Options"
    provides: str | None = None
    default: str | None = None

    def available(self) -> list[str]:
        """Return the names of the files in `tubelet/<kind>` that are parts of this kind."""
        return [name for name in available(self.kind) if self._is_part(find(self.kind, name))]

    def locate(self, raw: Mapping[str, Any]) -> tuple[type[Config], str]:
        name = self.check_name(raw["name"])
        module = find(self.kind, name)
        schema = getattr(module, self.options, PartOptions)
        if not (isinstance(schema, type) and issubclass(schema, Config) and "name" in schema.model_fields):
            raise ConfigError(
                f"{module.__name__}.{self.options}: has to be a subclass of tubelet.config.Config that declares "
                "`name: str`, the name of the part"
            )
        is_file = "." not in name and snake_case(name) in available(self.kind)
        return schema, snake_case(name) if is_file else name

    def check_name(self, name: str) -> str:
        """Return `name`; raise ConfigError where it names no part of this kind."""
        if "." not in name and snake_case(name) in available(self.kind) and not self._is_part(find(self.kind, name)):
            raise ConfigError(_unknown(self.kind, name, self.available() + _entry_point_names(self.kind)))
        try:
            module = find(self.kind, name)
        except ConfigError:
            if "." in name:
                raise
            raise ConfigError(_unknown(self.kind, name, self.available() + _entry_point_names(self.kind))) from None
        if not self._is_part(module):
            if "." not in name and _entry_point_names(self.kind).count(name) == 0:
                known = self.available() + _entry_point_names(self.kind)
                raise ConfigError(
                    f"{_unknown(self.kind, name, known)} The importable module '{name}' has no "
                    f"{self.provides or self.options}"
                )
            raise ConfigError(f"'{name}': the module has no {self.provides or self.options}")
        return name

    def _is_part(self, module: ModuleType) -> bool:
        return hasattr(module, self.provides or self.options)


# ---------------------------------------------------------------- factories


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
    """A part that is built by a callable with annotated arguments; see the module's docstring.

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
            return name, self._attribute(_import(parent), attribute)
        files = [file for file in _files(self.package) if name in _top_level_names(file)]
        files = [file for file in files if self._is_part(getattr(importlib.import_module(file), name))]
        if len(files) > 1:
            raise ConfigError(f"'{name}' is defined in {' and '.join(files)}; add module: with one of these")
        if files:
            return name, getattr(importlib.import_module(files[0]), name)
        for entry_point in _entry_points(self.kind):
            if entry_point.name == name:
                return name, self._check(entry_point.load(), name)
        raise ConfigError(
            f"'{name}': not among the {self.kind}. {nearest(name, [*self.available(), *_entry_point_names(self.kind)])}"
        )

    def _locate_in(self, name: str, module: str) -> tuple[str, Callable[..., Any]]:
        file = f"{self.package}.{snake_case(module)}"
        if "." not in module and not self._parts_of(file):
            files = [other.rpartition(".")[2] for other in _files(self.package) if self._parts_of(other)]
            raise UnknownModule(f"'{module}': no {self.kind} in such a file. {nearest(snake_case(module), files)}")
        path = module if "." in module else file
        factory = self._attribute(_import(path), name)
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
