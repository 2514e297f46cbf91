"""The packages of `pip install tubelet[language]`."""

import importlib.util
from collections.abc import Iterable

from tubelet.config import ConfigError

MODELS = ("tokenizers", "transformers")
ADAPTERS = ("peft",)
METRICS = ("sacrebleu", "pycocoevalcap")


def check_installed(packages: Iterable[str]) -> None:
    """Raise ConfigError where a package is not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"{' and '.join(missing)}: not installed. Run `pip install 'tubelet[language]'`")
