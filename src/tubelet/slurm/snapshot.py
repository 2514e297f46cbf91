"""The code that jobs run: a copy, so that editing the checkout does not change a queued job."""

import importlib.metadata
import shutil
import subprocess
import warnings
from pathlib import Path

from tubelet.runtime.run_folder import git_state, write_atomic


def take(folder: Path) -> Path:
    """Copy the files that git knows, as they are now, to `folder/code`; returns where jobs shall run.

    Beside it, `git.txt` has the revision and the uncommitted changes, `pip_freeze.txt` the installed packages. Warns
    of code that git does not know, and runs jobs from the current folder where that is no git checkout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "git.txt", git_state(Path.cwd()))
    write_atomic(folder / "pip_freeze.txt", "".join(f"{line}\n" for line in _installed()))
    if _git("rev-parse", "--show-prefix") != "\n":
        said = f"{Path.cwd()} is not the top of a git checkout: there is no copy of the code, jobs run from here."
        warnings.warn(f"{said} Leave it unchanged until they have ended", stacklevel=2)
        return Path.cwd()
    if unknown := _files("--others", "--exclude-standard", "--", "*.py"):
        warnings.warn(f"not in the copy of the code, as git does not know them: {', '.join(unknown)}", stacklevel=2)
    return _copy(_files(), folder)


def _copy(names: list[str], folder: Path) -> Path:
    code, aside = folder / "code", folder / "code.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    for name in names:
        if Path(name).is_file():  # else it has been removed and the removal is not committed
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, aside / name)
    write_atomic(aside / "git.txt", (folder / "git.txt").read_text(encoding="utf-8"))
    shutil.rmtree(code, ignore_errors=True)
    return aside.rename(code)


def _git(*words: str) -> str | None:
    """What git says; None where it fails, or is not there."""
    if shutil.which("git") is None:
        return None
    said = subprocess.run(["git", *words], capture_output=True, text=True)
    return None if said.returncode else said.stdout


def _files(*words: str) -> list[str]:
    return [name for name in (_git("ls-files", "-z", *words) or "").split("\0") if name]


def _installed() -> list[str]:
    return sorted({f"{package.name}=={package.version}" for package in importlib.metadata.distributions()})
