"""The lists of an external data set: written, and checked for the folds of the study, before any job starts."""

import re
from collections.abc import Iterator
from pathlib import Path

from app.study.options import Options
from tubelet.config import ConfigError, nearest
from tubelet.config.registry import find

FOLDER = "lists"
"""Their folder in that of the study."""


def write_lists(study: Options, prefix: str = "") -> None:
    """Write the lists of a study that has `data`.

    Args:
        study: The study.
        prefix: Path of the keys of the study in the user's file, `datasets.<name>.` where there are several.

    Raises:
        ConfigError: `data` is not the folder of the data set, or there is no list of a fold. The message has the key.
    """
    if study.lists is None or study.data is None:
        return
    try:
        find("data", study.lists).write_lists(Path(study.data).absolute(), Path(study.folder) / FOLDER)
    except ConfigError as error:
        raise ConfigError(f"{prefix}data: {error}") from None
    folder = Path(study.folder) / FOLDER
    written = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    for key, name in _names(study):
        folds = _folds(name, written)
        if not folds and name not in written:
            valid = {re.sub(r"^fold\d+", "fold{fold}", other) for other in written}
            raise ConfigError(f"{prefix}{key}: '{name}' is no list of {study.lists}. {nearest(name, valid)}")
        if "{fold}" in name and (missing := [str(fold) for fold in study.folds if fold not in folds]):
            raise ConfigError(
                f"{prefix}folds: {', '.join(missing)}; the lists {name} of {study.lists} have folds {_range(folds)}"
            )


def _names(study: Options) -> Iterator[tuple[str, str]]:
    """Yield the lists that the study reads: the key, and the name of the file with `{fold}`."""
    texts = [
        (f"tasks.{name}.{part}", getattr(task, part))
        for name, task in study.tasks.items()
        for part in ("train", "test")
    ]
    texts += [("pretrain.overrides", text) for text in study.pretrain.overrides]
    texts += [
        (f"objectives.{name}.overrides", text)
        for name, objective in study.objectives.items()
        for text in objective.overrides
    ]
    for key, text in texts:
        for name in re.findall(rf"{{folder}}/{FOLDER}/([^'\"\s,\]]+)", text):
            yield key, name


def _folds(name: str, written: list[str]) -> list[int]:
    """Return the folds for which there is a list of this name."""
    if "{fold}" not in name:
        return []
    return [fold for fold in range(len(written)) if name.replace("{fold}", str(fold)) in written]


def _range(folds: list[int]) -> str:
    whole = folds == list(range(folds[0], folds[-1] + 1)) and len(folds) > 1
    return f"{folds[0]} to {folds[-1]}" if whole else ", ".join(map(str, folds))
