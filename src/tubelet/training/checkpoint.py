"""Checkpoints that are whole or absent: written aside, flushed, renamed; the last good ones are kept."""

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

LATEST = "latest.pt"


class CheckpointError(Exception):
    """A checkpoint that cannot be used. The message names the file and what to do."""


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as `folder/step-<step>.pt`, let `folder/latest.pt` name it, and drop all but the last `keep`.

    A kill at any moment leaves the previous checkpoint and `latest.pt` whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    aside = path.with_suffix(".tmp")
    with open(aside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    link = folder / (LATEST + ".tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, folder / LATEST)
    for old in found(folder)[:-keep]:
        old.unlink()
    return path


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if re.fullmatch(r"step-\d{8,}\.pt", path.name))


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The newest readable checkpoint of `folder`; None when it has none.

    A damaged file is reported and set aside as `*.damaged`, and the one before it is used. Raises CheckpointError when
    all are damaged: a run never starts again from zero without a word.
    """
    paths = found(folder)
    for path in reversed(paths):
        try:
            return read(path)
        except CheckpointError as error:
            warnings.warn(f"{error}\n  set aside as {path.name}.damaged; going back to the one before", stacklevel=2)
            os.replace(path, path.with_name(path.name + ".damaged"))
    if paths:
        raise CheckpointError(
            f"{folder}: none of the {len(paths)} checkpoints can be read (now named *.damaged). "
            "Restore one, or choose another `folder:` to start anew."
        )
    return None


def read(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """One checkpoint, without executing code. Raises CheckpointError when the file is damaged or missing."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if broken := archive.testzip():
                raise CheckpointError(f"{path}: damaged (wrong checksum of {broken})")
        return torch.load(path, map_location=map_location, weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise CheckpointError(f"{path}: damaged, or no checkpoint ({type(error).__name__}: {error})") from error


def load_state(module: torch.nn.Module, state: dict[str, Any], what: str) -> None:
    """Load `state` into `module`; raises CheckpointError that lists what does not match."""
    own = module.state_dict()
    problems = [f"  missing: {name}" for name in own if name not in state]
    problems += [f"  surplus: {name}" for name in state if name not in own]
    problems += [
        f"  shape of {name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = [f"  … and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise CheckpointError("\n".join([f"{what} does not match the model:", *problems[:20], *more]))
    module.load_state_dict(state)
