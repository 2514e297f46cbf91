"""Files that are complete or absent."""

import contextlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tubelet.config import UserError

if TYPE_CHECKING:
    from torch import Tensor


_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{32}\.tmp", re.DOTALL)


class NotFinite(UserError):
    """A number that is not finite is no result. The message names the numbers and the remedy."""


def cache_folder() -> Path:
    """Return the folder for files that any process of this user can make again, `XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tubelet"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which becomes `path` when the block ends without an error.

    A kill leaves the old file or the new one, never a part of it. The temporary name is unique, so that several
    processes, also of several hosts, may write the same file.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder: Path, name: str = "") -> None:
    """Remove the temporary files that killed processes have left in a folder, of `name` or of all files.

    No other process may be writing there.
    """
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and name in ("", match[1]):
            path.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8, paths as their bytes) or bytes so that a kill leaves the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode(errors="surrogateescape") if isinstance(content, str) else content)


def write_once(path: Path, content: str) -> None:
    """Write text to a new file, whole at any time, also when several processes of several hosts try.

    Raises:
        FileExistsError: Another process was faster.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.link(temporary, path)  # atomic, and fails if the file exists
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as the umask says; the library makes files private."""
    from safetensors.torch import save_file  # programs that only plan jobs do without torch

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, see `write_atomic`; the folder is made if it is missing.

    Raises:
        NotFinite: It has a number that is not finite. What is left open has to be None.
    """
    if found := list(_not_finite(content)):
        raise NotFinite(
            f"{path} is not written: {', '.join(found[:5])}{', …' if len(found) > 5 else ''} is no result. The weights "
            "or features are not finite: choose another checkpoint, or a lower learning rate"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no such file. Raises NotFinite where it has NaN or Infinity."""

    def refuse(constant: str) -> None:
        raise NotFinite(f"{path} has {constant}, which is no result; remove the file, and run its program again")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse) if path.is_file() else None


def _not_finite(content: Any, key: str = "") -> Iterator[str]:
    """Yield "key.path nan" for each number in `content` that is not finite."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _not_finite(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _not_finite(value, f"{key}.{index}")
    elif isinstance(content, float) and not math.isfinite(content):
        yield f"{key} {content}"
