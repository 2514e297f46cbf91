"""Errors of files in a run folder that a report cannot read."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tubelet.config import ConfigError

NO_MAPPING = "it is not a mapping of keys to values"


def damaged(path: Path, problem: object) -> ConfigError:
    """Return the error of a file that says something else than its program has written."""
    return ConfigError(
        f"{path}: it is damaged ({' '.join(str(problem).split())}), so there is no report of it. Restore it, or run "
        "its program again"
    )


@contextlib.contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn errors of reading and parsing a file into a ConfigError that names it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from None
