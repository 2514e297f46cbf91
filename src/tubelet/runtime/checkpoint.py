"""Checkpoints that are whole or absent: written aside, flushed, renamed; the last good ones are kept.

A checkpoint is a file `step-<step>.pt`, or, of a sharded model, a folder `step-<step>.dcp` with a file of each process
(torch.distributed.checkpoint). Both are read as the same dictionary.
"""

import os
import pathlib
import pickle
import re
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from tubelet.config import UserError

LATEST = "latest.pt"
REST = "rest.pt"  # in a sharded checkpoint: what is no tensor


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message names the file and what to do."""


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as `folder/step-<step>.pt`, let `folder/latest.pt` name it, and drop all but the last `keep`.

    A kill at any moment leaves the previous checkpoint and `latest.pt` whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    aside = path.with_suffix(".tmp")
    write(aside, state)
    adopt(aside, path, keep)
    return path


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a file and flush it to the disk.

    Where that fails, nothing is left of it: what a full disk is to tell of it needs room, too.
    """
    try:
        with open(path, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def adopt(aside: Path, path: Path, keep: int) -> None:
    """Give a checkpoint that was written `aside` its name `path`; see `save`."""
    remove(path)
    os.replace(aside, path)
    link = path.with_name(LATEST + ".tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, path.with_name(LATEST))
    for old in found(path.parent)[:-keep]:
        remove(old)


def found(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}\.(pt|dcp)", path.name))


def load_latest(folder: Path) -> dict[str, Any] | None:
    """The content of the newest whole checkpoint of `folder`; None when it has none. Errors as for `newest`."""
    path = newest(folder)
    return None if path is None else read(path)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of `folder`; None when it has none.

    A damaged one is reported and set aside as `*.damaged`, and the one before it is used. Raises CheckpointError when
    all are damaged: a run never starts again from zero without a word.
    """
    paths = found(folder)
    for path in reversed(paths):
        try:
            check_intact(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"{error}\n  set aside as {path.name}.damaged; going back to the one before", stacklevel=2)
            os.replace(path, path.with_name(path.name + ".damaged"))
    if paths:
        raise CheckpointError(
            f"{folder}: none of the {len(paths)} checkpoints can be read (now named *.damaged). "
            "Restore one, or choose another `folder:` to start anew."
        )
    return None


def check_intact(path: Path) -> None:
    """Raises CheckpointError when a checkpoint is missing, cut short, or a file's checksums are wrong."""
    if path.is_dir():
        _check_lengths(path)
        path = path / REST
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if broken := archive.testzip():
                raise CheckpointError(f"{path}: damaged (wrong checksum of {broken})")
    except (zipfile.BadZipFile, EOFError) as error:
        raise _damaged(path, error) from error


def read(path: Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """One checkpoint, all of it, without executing code. Raises CheckpointError when it is damaged or missing."""
    check_intact(path)
    try:
        if not path.is_dir():
            return torch.load(path, map_location=map_location, weights_only=True)
        reader = _Reader(path)
        metadata = reader.read_metadata()
        tensors = {
            name: torch.empty(tensor.size, dtype=tensor.properties.dtype)
            for name, tensor in metadata.state_dict_metadata.items()
        }
        dcp.load(tensors, storage_reader=reader, no_dist=True)
        state = torch.load(path / REST, map_location=map_location, weights_only=True)
        for name, tensor in tensors.items():
            *outer, last = metadata.planner_data[name]
            node = state
            for key in outer:
                node = node.setdefault(key, {})
            node[last] = tensor
        return state
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise _damaged(path, error) from error


def read_shards(path: Path, like: dict[str, Any]) -> dict[str, Any]:
    """A sharded checkpoint as this process's shards: the tensors of `like` are overwritten, all else is read."""
    check_intact(path)
    tensors, _ = tensors_and_rest(like)
    dcp.load(tensors, storage_reader=_Reader(path))
    return _merged(tensors, torch.load(path / REST, weights_only=True))


def tensors_and_rest(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A nested state taken apart: only its tensors, and everything else."""
    tensors: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            tensors[key], rest[key] = tensors_and_rest(value)
        else:
            (tensors if isinstance(value, torch.Tensor) else rest)[key] = value
    return tensors, rest


def _merged(tensors: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(tensors[key], rest[key]) for key in tensors.keys() & rest.keys()}
    return tensors | rest | both


class _Reader(dcp.FileSystemReader):
    """torch's reader, but the description of the shards may name nothing that could be executed."""

    def read_metadata(self, *_: Any, **__: Any) -> dcp.Metadata:
        with (self.path / ".metadata").open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or described.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        value = super().find_class(module, name)
        if not (isinstance(value, torch.dtype) or value in _HARMLESS):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the description of a checkpoint")
        return value


_HARMLESS = (
    described.BytesStorageMetadata,
    described.ChunkStorageMetadata,
    described.Metadata,
    described.MetadataIndex,
    described.StorageMeta,
    described.TensorProperties,
    described.TensorStorageMetadata,
    described._MEM_FORMAT_ENCODING,
    _StorageInfo,
    pathlib.PosixPath,
    torch.Size,
    torch.serialization._get_layout,
)


def _check_lengths(folder: Path) -> None:
    """The files of a sharded checkpoint have no checksums, but their lengths are known."""
    try:
        metadata = _Reader(folder).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        raise _damaged(folder, error) from error
    for piece in metadata.storage_data.values():
        file = folder / piece.relative_path
        if not file.is_file() or file.stat().st_size < piece.offset + piece.length:
            raise CheckpointError(f"{folder}: damaged ({piece.relative_path} is missing or cut short)")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path}: damaged, or no checkpoint ({type(error).__name__}: {error})")


def remove(path: Path) -> None:
    """Delete a checkpoint, or what there is of one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load_state(module: torch.nn.Module, state: dict[str, Any], what: str) -> None:
    """Load `state`, whole or sharded, into `module`; raises CheckpointError that lists what does not match."""
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
    whole = not any(isinstance(tensor, DTensor) for tensor in state.values())
    set_model_state_dict(module, state, options=StateDictOptions(full_state_dict=whole))


def check_same_batch_size(then: int, now: int, key: str) -> None:
    """Raises CheckpointError where the steps of all processes together take another number of samples than `then`."""
    if then != now:
        raise CheckpointError(
            f"the run's steps take {then} samples, {key} times the number of processes is {now} here. Change one of "
            "them, or choose another folder=…"
        )
