"""A name in the YAML finds the file of that name: adding a file is the registration."""

import importlib
import pkgutil
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Annotated, Any

from pydantic import AfterValidator

from tubelet.config import ConfigError, nearest


def find(kind: str, name: str) -> ModuleType:
    """The module `tubelet.<kind>.<name>`; `VideoDataset` and `video_dataset` name the same file.

    Raises ConfigError with the nearest name when there is no such file.
    """
    file = snake_case(name)
    if file not in available(kind):
        raise ConfigError(_unknown(kind, name, available(kind)))
    return _load(kind, file)


def name_of(kind: str, provides: str) -> Any:
    """The type of a YAML key that names a file of tubelet/<kind> which has `provides`; `find` then finds it."""

    def has_it(file: str) -> bool:
        return hasattr(_load(kind, file), provides)

    def check(name: str) -> str:
        file = snake_case(name)
        if file not in available(kind) or not has_it(file):
            raise ValueError(_unknown(kind, name, filter(has_it, available(kind))))
        return name

    return Annotated[str, AfterValidator(check)]


def available(kind: str) -> list[str]:
    """Names of the files in `tubelet/<kind>`."""
    package = importlib.import_module(f"tubelet.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _unknown(kind: str, name: str, valid: Iterable[str]) -> str:
    return f"'{name}': no such file in tubelet/{kind}. {nearest(snake_case(name), valid)}"


def _load(kind: str, file: str) -> ModuleType:
    return importlib.import_module(f"tubelet.{kind}.{file}")


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
