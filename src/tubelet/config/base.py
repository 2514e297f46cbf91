"""Base class of options, errors of configurations, and markers of option fields."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import pydantic


class UserError(Exception):
    """An error that the user can fix; the message says how. Programs end with it instead of a traceback.

    Attributes:
        printed_elsewhere: Whether another process of the job prints the message.
    """

    printed_elsewhere = False


class ConfigError(UserError):
    """An invalid configuration. The message names the file, the key and the remedy."""


@contextlib.contextmanager
def naming(key: str, instead_of: str) -> Iterator[None]:
    """Let messages of ConfigErrors have the key that the user has set instead of the one that code below has got."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{instead_of}: ", f"{key}: ")) from None


class Config(pydantic.BaseModel):
    """Options of a component: typed and read-only. Unknown keys, wrong types, inf and nan are errors."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=()
    )


# YAML has lists only, so a tuple is written as a list there.
Pair = Annotated[tuple[float, float], pydantic.Field(strict=False)]
Triple = Annotated[tuple[float, float, float], pydantic.Field(strict=False)]


def _height_and_width(value: Any) -> Any:
    if isinstance(value, list | tuple) and not (len(value) == 2 and all(type(x) is int and x > 0 for x in value)):
        raise ValueError(f"expected pixels, one number for a square or [height, width], got {list(value)}")
    return value


def _square(value: Any) -> Any:
    if isinstance(value, list | tuple):
        raise ValueError(
            f"expected the pixels of a square as one number, got {list(value)}; only pretraining's "
            "data.crop_size may be [height, width]"
        )
    return value


Size = Annotated[
    pydantic.PositiveInt | Annotated[tuple[pydantic.PositiveInt, pydantic.PositiveInt], pydantic.Field(strict=False)],
    pydantic.BeforeValidator(_height_and_width),
]
"""Pixels: one number for a square, or [height, width]."""
Square = Annotated[int, pydantic.Field(ge=1), pydantic.BeforeValidator(_square)]
"""Pixels of height and width."""


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
