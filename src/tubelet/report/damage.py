"""Errors of files in a run folder that a report cannot read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError
from tubelet.runtime.files import read_json

NO_MAPPING = "it is not a mapping of keys to values"


def damaged(path: Path, problem: object) -> ConfigError:
    """Return the error of a file that says something else than its program has written."""
    return ConfigError(
        f"{path}: it is damaged ({' '.join(str(problem).split())}), so there is no report of it. Restore it, or run "
        "its program again"
    )


def read_mapping(path: Path, read: Callable[[Path], Any] = read_json) -> dict[str, Any]:
    """Return what `read` finds in a JSON file, a mapping. Raises ConfigError, which names the file."""
    try:
        content = read(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    if not isinstance(content, dict):
        raise damaged(path, NO_MAPPING)
    return content
