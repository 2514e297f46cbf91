"""YAML files into typed, checked options.

The options of a component are a subclass of `Config` beside it; a program's `Options` combines them. A file may name
another one in `base:` and then holds only what differs: mappings are merged key by key, all else is replaced. With
`replace: true` in a mapping it replaces that of the base, too, and so it does where it names another objective, head or
data format, whose options are others.
"""

from tubelet.config.base import (
    RESUME_IGNORED,
    RESUME_NULL_MATCHES,
    Config,
    ConfigError,
    Pair,
    Size,
    Square,
    Triple,
    UserError,
    naming,
    nearest,
)
from tubelet.config.reading import Schema, check, check_part, check_variant, dump, load, merge, read

__all__ = [
    "RESUME_IGNORED",
    "RESUME_NULL_MATCHES",
    "Config",
    "ConfigError",
    "Pair",
    "Schema",
    "Size",
    "Square",
    "Triple",
    "UserError",
    "check",
    "check_part",
    "check_variant",
    "dump",
    "load",
    "merge",
    "naming",
    "nearest",
    "read",
]
