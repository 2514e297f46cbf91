"""What is installed with the library: the programs (`app`, `evals`, `benchmarks.plan`) and their configurations.

A wheel has them in the folder `tubelet/programs`, a checkout at its top. They are not installed as packages of their
own, because the names `app` and `evals` are those of other distributions, too. The command `tubelet` puts the folder
first on the path of its process and of its children; other processes do not see it.
"""

import difflib
import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tubelet.config.base import ConfigError

_INSTALLED = Path(__file__).parents[1] / "programs"


def programs() -> Path:
    """Return the folder with the programs and `configs`."""
    return _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[3]


def add_programs_to_path() -> None:
    """Make `app` and `evals` importable from any current folder."""
    if (folder := str(programs())) not in sys.path:
        sys.path.insert(0, folder)


def python_path() -> str:
    """Return what precedes `python -m app.main` in a shell: nothing in a checkout, else the variable PYTHONPATH."""
    return f"PYTHONPATH={_INSTALLED} " if _INSTALLED.is_dir() else ""


def find(fname: str | Path, prefer: Sequence[str] = ()) -> Path:
    """Return the file of a configuration: an existing file, else a shipped one as in `look_up`."""
    path = Path(fname)
    return path if path.is_file() else look_up(fname, f"looked in {Path.cwd()}", prefer)


def look_up(fname: str | Path, place: str, prefer: Sequence[str] = ()) -> Path:
    """Return the file of a shipped configuration.

    Args:
        fname: `configs/pretrain/demo.yaml`, `pretrain/demo` or `demo`.
        place: Where a file of this name has been looked for, for messages.
        prefer: Folders of `configs` in which a name without a folder is looked up first, in their order.

    Raises:
        ConfigError: No such file, or files of this name in several folders. The message has the nearest names.
    """
    path = Path(fname)
    text = path.as_posix()
    # `demo.yaml` without a folder is a file of the user's that is missing.
    may_be_shipped = text.startswith("configs/") or not (text.endswith(".yaml") or path.is_absolute())
    name = text.removeprefix("configs/").removesuffix(".yaml")
    names = _names() if may_be_shipped else {}
    for choice in (name, *(f"{folder}/{name}" for folder in prefer)):
        if choice in names:
            return names[choice]
    same = [other for other in names if other.endswith(f"/{name}")]
    if len(same) == 1:
        return names[same[0]]
    if same:
        raise ConfigError(f"{fname}: the name of {len(same)} configurations; choose one of {', '.join(same)}")
    raise ConfigError(f"{path}: no such file ({place}){_nearest(name, names, prefer)}")


def find_folder(name: str) -> Path:
    """Return a folder: `name` where it exists, else that of the shipped configurations, such as `configs/zoo`."""
    path = Path(name)
    shipped = programs() / path
    return shipped if not path.is_dir() and path.parts[:1] == ("configs",) and shipped.is_dir() else path


@functools.cache
def _names() -> dict[str, Path]:
    folder = programs() / "configs"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def _nearest(name: str, names: Iterable[str], prefer: Sequence[str]) -> str:
    """Return the end of a message: which shipped configurations have a name like this."""
    if not names:
        return ""
    last = {other: other.rpartition("/")[2] for other in names if not prefer or other.split("/")[0] in prefer}
    close = difflib.get_close_matches(name, last, n=3)
    near = difflib.get_close_matches(name.rpartition("/")[2], set(last.values()), n=2, cutoff=0.7)
    close = list(dict.fromkeys([*close, *(other for other in last if last[other] in near)]))
    found = f"Did you mean {' or '.join(close)}?" if close else f"Shipped: {', '.join(last)}."
    return f", and no configuration of this name is shipped. {found}"
