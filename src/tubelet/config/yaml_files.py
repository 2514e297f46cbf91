"""Read YAML: with numbers such as `1e-3`, without a key that is given twice, and with file and line in every error."""

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

from tubelet.config.base import ConfigError

_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """A loader that reads `1e-3` as a number (in YAML 1.1 it is a string) and refuses duplicate keys."""

    # Beside YAML's characters, those that stand for the bytes of a path that is not UTF-8; see `os.fsdecode`.
    NON_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\udc80-\udcff\ue000-\ufffd\U00010000-\U0010ffff]")  # type: ignore[misc]

    def compose_mapping_node(self, anchor: Any) -> Any:
        # Not in `construct_mapping`, where a mapping may already hold the keys that it merges with `<<`.
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise _DuplicateKey(f"line {line}: '{key.value}' is given twice, first in line {lines[name]}; keep one")
            lines[name] = line
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _DuplicateKey(yaml.YAMLError):
    """The message has the lines."""


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file.

    Raises:
        ConfigError: It cannot be read, is not valid YAML, or has a key twice.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    encoding = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}, line {line}: a character that is not UTF-8; save the file as UTF-8") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a text as in a YAML file. Raises ConfigError, whose message begins with `where` it stands."""
    try:
        loader = _Loader(text)
        loader.name = where
        return _unshared(loader.get_single_data())
    except _DuplicateKey as error:
        raise ConfigError(f"{where}, {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: an alias (*) is within its own anchor (&), or the nesting is too deep") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date, or a number with a tag, that is none
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def _unshared(node: Any) -> Any:
    """Copy values that a YAML `*alias` shares with its `&anchor`, so that an override changes only one of them."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(value) for value in node] if isinstance(node, list) else node
