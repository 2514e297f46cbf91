"""Base class of options, errors of configurations, and markers of option fields."""

import difflib
import re
from collections.abc import Iterable
from typing import Annotated

import pydantic


class UserError(Exception):
    """An error that the user can fix; the message says how. Programs end with it instead of a traceback."""


class ConfigError(UserError):
    """An invalid configuration. The message names the file, the key and the remedy."""


class Config(pydantic.BaseModel):
    """Options of a component: typed and read-only. Unknown keys, wrong types, inf and nan are errors."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


# YAML has lists only, so a tuple is written as a list there.
Pair = Annotated[tuple[float, float], pydantic.Field(strict=False)]
Triple = Annotated[tuple[float, float, float], pydantic.Field(strict=False)]
# Pixels: one number for a square, or [height, width].
Size = pydantic.PositiveInt | Annotated[tuple[pydantic.PositiveInt, pydantic.PositiveInt], pydantic.Field(strict=False)]


class Marker:
    """Metadata of an option field: `folder: Annotated[str, RESUME_IGNORED]`."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


RESUME_IGNORED = Marker("RESUME_IGNORED")
"""The option, or all options of the section, may differ when a run is continued: nothing that is learned depends on
it."""
RESUME_NULL_MATCHES = Marker("RESUME_NULL_MATCHES")
"""null, which leaves the value to the program, is no other value than any."""


def snake_case(name: str) -> str:
    """Return the name of the file of a part: `VideoDataset` -> `video_dataset`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return "Did you mean 'x'?" for the closest of the `valid` names, else the list of them."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"Did you mean '{close[0]}'?" if close else f"Valid: {', '.join(valid) or 'none'}."
