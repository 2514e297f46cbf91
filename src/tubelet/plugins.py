"""A name in the YAML finds the file of that name: adding a file is the registration."""

import importlib
import pkgutil
import re
from types import ModuleType

from tubelet.config import ConfigError, nearest


def find(kind: str, name: str) -> ModuleType:
    """The module `tubelet.<kind>.<name>`; `VideoDataset` and `video_dataset` name the same file.

    Raises ConfigError with the nearest name when there is no such file.
    """
    file = snake_case(name)
    names = available(kind)
    if file not in names:
        raise ConfigError(f"'{name}': no file of that name in tubelet/{kind}. {nearest(file, names)}")
    return importlib.import_module(f"tubelet.{kind}.{file}")


def available(kind: str) -> list[str]:
    """Names of the files in `tubelet/<kind>`."""
    package = importlib.import_module(f"tubelet.{kind}")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
