"""A name in the YAML finds the file of that name: adding a file is the registration."""

import importlib
import pkgutil
import re
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator

from tubelet.config import ConfigError, nearest


def find(kind: str, name: str, provides: str | None = None) -> ModuleType:
    """The module `tubelet.<kind>.<name>`; `VideoDataset` and `video_dataset` name the same file.

    Raises ConfigError with the nearest name when there is no such file, or none that has `provides`.
    """
    file = snake_case(name)
    if file not in _having(provides, kind, [file] if file in available(kind) else []):
        fitting = _having(provides, kind, available(kind))
        raise ConfigError(f"'{name}': no such file in tubelet/{kind}. {nearest(file, fitting)}")
    return _load(kind, file)


def name_of(kind: str, provides: str) -> Any:
    """The type of a YAML key that names a file as `find` does; what is wrong with the name is said of the key."""

    def check(name: str) -> str:
        try:
            find(kind, name, provides)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return name

    return Annotated[str, AfterValidator(check)]


def available(kind: str) -> list[str]:
    """Names of the files in `tubelet/<kind>`."""
    package = importlib.import_module(f"tubelet.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _having(provides: str | None, kind: str, files: list[str]) -> list[str]:
    return [file for file in files if provides is None or hasattr(_load(kind, file), provides)]


def _load(kind: str, file: str) -> ModuleType:
    return importlib.import_module(f"tubelet.{kind}.{file}")


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
