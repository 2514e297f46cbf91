"""Find pluggable parts by name, and check their options.

A part is selected by `{name: …, **its own options}`, or by its name alone. There are two kinds of parts:

- A `Module` part is a Python module with an options class, such as a mask or an objective. Its name is that of a file
  in `tubelet/<kind>`, of an entry point of the group `tubelet.<kind>`, or an importable module such as
  `my_package.my_module`.
- A `Factory` part, see `tubelet.config.factories`, is a callable that builds an `nn.Module`, such as `vit_large`. Its
  options are the annotated arguments of the constructor.

Adding the file is the registration.
"""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, cast

import pydantic
from pydantic_core import InitErrorDetails, PydanticCustomError, core_schema

from tubelet.config.base import Config, ConfigError, nearest, snake_case


def find(kind: str, name: str) -> ModuleType:
    """Return the module of a part.

    Args:
        kind: Subpackage of tubelet, such as `masks`.
        name: File in `tubelet/<kind>` (`VideoDataset` and `video_dataset` are the same), entry point of the group
            `tubelet.<kind>`, or importable module.

    Raises:
        ConfigError: There is no such module. The message has the nearest name.
    """
    module = _find(kind, name)
    if module is None:
        raise ConfigError(_unknown(kind, name, [*available(kind), *entry_point_names(kind)]))
    return module


def _find(kind: str, name: str) -> ModuleType | None:
    if "." in name:
        return import_module(name)
    if _is_file(kind, name):
        return importlib.import_module(f"tubelet.{kind}.{snake_case(name)}")
    for entry_point in entry_points(kind):
        if entry_point.name == name:
            return entry_point.load()
    if name.isidentifier() and importlib.util.find_spec(name) is not None:
        return import_module(name)
    return None


def _is_file(kind: str, name: str) -> bool:
    return "." not in name and snake_case(name) in available(kind)


def available(kind: str) -> list[str]:
    """Return the names of the files in `tubelet/<kind>`."""
    package = importlib.import_module(f"tubelet.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def part_name(kind: str, provides: str) -> pydantic.AfterValidator:
    """Return the check of a field that holds the name of a part whose module has the attribute `provides`."""
    part = Module(kind, provides)

    def check(name: str) -> str:
        try:
            return part.check_name(name)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    return pydantic.AfterValidator(check)


def import_module(name: str) -> ModuleType:
    """Import a module that a configuration names. Raises ConfigError where there is none of this name."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(f"'{name}': not the name of a module; write it as in an import, my_package.my_module")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A missing import inside of the module is another error, and not to be hidden.
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(f"'{name}': cannot be imported: {error}") from None
        raise


def entry_points(kind: str) -> list[importlib.metadata.EntryPoint]:
    """Return the entry points of the group `tubelet.<kind>`, by which installed packages add parts."""
    return list(importlib.metadata.entry_points(group=f"tubelet.{kind}"))


def entry_point_names(kind: str) -> list[str]:
    return [entry_point.name for entry_point in entry_points(kind)]


def _unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    return f"'{name}': not in tubelet/{kind.replace('.', '/')}. {nearest(snake_case(name), valid)}"


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
        return schema, snake_case(name) if _is_file(self.kind, name) else name

    def check_name(self, name: str) -> str:
        """Return `name`; raise ConfigError where it names no part of this kind."""
        module = _find(self.kind, name)
        if module is not None and self._is_part(module):
            return name
        others = entry_point_names(self.kind)
        is_file, lacks = _is_file(self.kind, name), f"has no {self.provides or self.options}"
        if module is not None and not is_file and ("." in name or name in others):
            raise ConfigError(f"'{name}': the module {lacks}")
        message = _unknown(self.kind, name, [*self.available(), *others])
        if module is not None and not is_file:
            message += f" The importable module '{name}' {lacks}"
        raise ConfigError(message)

    def _is_part(self, module: ModuleType) -> bool:
        return hasattr(module, self.provides or self.options)
