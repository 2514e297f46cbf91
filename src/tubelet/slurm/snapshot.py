"""A copy of the code for jobs to run, so that edits of the checkout do not change queued jobs."""

import importlib.metadata
import logging
import shutil
import subprocess
from pathlib import Path

from tubelet.runtime.files import write_atomic
from tubelet.runtime.run_folder import git_state

logger = logging.getLogger(__name__)


def take(folder: Path) -> Path:
    """Copy the files that git tracks, with their uncommitted changes, to `folder/code`.

    Also writes `folder/git.txt` with the revision and the uncommitted changes, and `folder/pip_freeze.txt` with the
    installed packages. Python files that git does not track are not copied, with a warning.

    Returns:
        The folder that jobs should run in: the copy, or the current folder if it is not the top of a git checkout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "git.txt", git_state(Path.cwd()))
    write_atomic(folder / "pip_freeze.txt", "".join(f"{line}\n" for line in _installed()))
    if _git("rev-parse", "--show-prefix") != "\n":
        logger.warning(
            f"{Path.cwd()} is not the top of a git checkout: the code is not copied, jobs run from here. Do not change "
            "it until they have ended"
        )
        return Path.cwd()
    if untracked := _files("--others", "--exclude-standard", "--", "*.py"):
        logger.warning(f"not in the copy of the code, as git does not track them: {', '.join(untracked)}")
    return _copy(_files(), folder)


def _copy(names: list[str], folder: Path) -> Path:
    code, temporary = folder / "code", folder / "code.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    for name in names:
        if Path(name).is_file():  # else it is deleted, and the deletion not committed
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, temporary / name)
    write_atomic(temporary / "git.txt", (folder / "git.txt").read_text(encoding="utf-8"))
    shutil.rmtree(code, ignore_errors=True)
    return temporary.rename(code)


def _git(*arguments: str) -> str | None:
    """The output of git; None if it fails or is not installed."""
    if shutil.which("git") is None:
        return None
    git = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return None if git.returncode else git.stdout


def _files(*arguments: str) -> list[str]:
    return [name for name in (_git("ls-files", "-z", *arguments) or "").split("\0") if name]


def _installed() -> list[str]:
    return sorted({f"{package.name}=={package.version}" for package in importlib.metadata.distributions()})
