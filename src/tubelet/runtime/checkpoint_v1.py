"""Read the checkpoints of Tubelet 0.1, and released files of torch.save.

0.1 wrote one dictionary: `step-<step>.pt` by torch.save, or, of a sharded model, a folder `step-<step>.dcp` by
torch.distributed.checkpoint, with `rest.pt` for what is not a tensor. No code in a file is executed.
"""

import dataclasses
import enum
import errno
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import StorageMeta, TensorStorageMetadata

from tubelet.runtime import file_formats
from tubelet.runtime.checkpoint_format import CheckpointError, DamagedCheckpoint, damaged

REST = "rest.pt"
# What damaged pickles raise beside UnpicklingError; not OSError, which may be no fault of the file.
_UNPICKLING_ERRORS = (AttributeError, EOFError, ImportError, LookupError, MemoryError, TypeError, ValueError)
_OPTIMIZERS = ("optimizer", "optimizers", "opt")


def check_intact(path: Path, kind: str = "") -> None:
    """Raises DamagedCheckpoint if a file is cut short or its checksums are wrong. The kinds are not kept apart here."""
    if path.is_dir():
        _check_lengths(path)
        path = path / REST
    if not path.is_file():
        raise DamagedCheckpoint(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not verify the checksums
            if wrong := archive.testzip():
                raise DamagedCheckpoint(f"{path}: damaged (wrong checksum of {wrong})")
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: damaged: {file_formats.unreadable(path)} ({error})") from error


def parts(path: Path) -> list[str]:
    return list(_weights(read_file(path) if path.is_file() else _read_folder(path, None)))


def read_metadata(path: Path) -> dict[str, Any]:
    content = read_file(path / REST if path.is_dir() else path)
    others = (*_OPTIMIZERS, *parts(path))
    return {
        # Version 2 has no tensors in its metadata.
        name: value.tolist() if isinstance(value, Tensor) else value
        for name, value in content.items()
        if name not in others and not _holds_tensors(value)
    }


def read_weights(
    path: Path, names: Iterable[str], like: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    names = list(names)
    if path.is_dir():
        return _weights(_read_folder(path, names, like))
    weights = _weights(read_file(path))
    # Cloned, as the file is mapped: it may be removed while the tensors are in use.
    return {part: {name: tensor.clone() for name, tensor in weights[part].items()} for part in names}


def read_optimizer(path: Path, like: dict[str, Any] | None) -> dict[str, Any] | None:
    if path.is_dir():
        tensors = _read_folder(path, ["optimizer"], {} if like is None else {"optimizer": like})
        return _merged(tensors, read_file(path / REST)).get("optimizer")
    content = read_file(path)
    if "optimizers" in content:  # of a probe's heads
        return {"optimizers": _cloned(content["optimizers"])}
    return _cloned(content.get("optimizer"))


def read_file(path: Path) -> dict[str, Any]:
    """The dictionary in a file of torch.save. Tensors stay on the disk until they are used.

    Raises:
        CheckpointError: It is another kind of file, which the message names, or damaged.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        if error.errno not in (None, errno.EINVAL, errno.ENOENT):
            raise
        # An offset in the file is wrong, or there is no such file.
        raise CheckpointError(f"{path}: {file_formats.unreadable(path)} ({_first_line(error)})") from error
    except (RuntimeError, pickle.UnpicklingError, *_UNPICKLING_ERRORS) as error:
        raise CheckpointError(f"{path}: {file_formats.unreadable(path)} ({_first_line(error)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a dictionary of state dicts; write {file_formats.SAVE}"
        )
    return {str(name): value for name, value in content.items()}


def describe(path: Path) -> list[str]:
    """What a file holds, for messages: its entries and, where they are no state dicts, their kinds."""
    content, weights = read_file(path), parts(path)
    return [name if name in weights else f"{name} ({_kind(value)})" for name, value in content.items()]


def _kind(value: Any) -> str:
    if isinstance(value, dict) and not value:
        return "an empty dict"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return "None" if value is None else type(value).__name__


def _first_line(error: Exception) -> str:
    """The error in one line; torch's go on for a page."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _weights(content: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The state dicts in a file."""
    return {
        name: value
        for name, value in content.items()
        if name not in _OPTIMIZERS
        and isinstance(value, dict)
        and value
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    }


def _holds_tensors(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(item, Tensor) or _holds_tensors(item) for item in values)


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(item) for key, item in value.items()}
    return [_cloned(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- sharded


def _read_folder(folder: Path, names: list[str] | None, like: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the tensors of the entries `names`, nested as they were saved.

    Args:
        folder: The checkpoint.
        names: Names of the entries; None for all, without reading them, on the meta device.
        like: Entries with the names of these tensors are read as shards like them.
    """
    reader, metadata = _Reader(folder), _read_index(folder)
    state: dict[str, Any] = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)  # all else is in `rest.pt`
        *outer, last = metadata.planner_data[name]
        if names is not None and outer[0] not in names:
            continue
        node, template = state, like
        for key in outer:
            node = node.setdefault(key, {})
            template = template.get(key) if isinstance(template, Mapping) else None
        tensor = template.get(last) if isinstance(template, Mapping) else None
        if isinstance(tensor, Tensor) and tensor.shape == stored.size:
            node[last] = torch.empty_like(tensor, dtype=stored.properties.dtype)
        else:
            device = "meta" if names is None else "cpu"
            node[last] = torch.empty(stored.size, dtype=stored.properties.dtype, device=device)
    if names is not None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself
                dcp.load(state, storage_reader=reader, no_dist=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise damaged(folder, error) from error
    return state


def _read_index(folder: Path) -> dcp.Metadata:
    try:
        return _Reader(folder).read_metadata()
    except (FileNotFoundError, pickle.UnpicklingError, *_UNPICKLING_ERRORS) as error:
        raise damaged(folder, error) from error


def _merged(tensors: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(tensors[key], rest[key])
        for key in tensors.keys() & rest.keys()
        if isinstance(tensors[key], dict) and isinstance(rest[key], dict)
    }
    return tensors | rest | both


class _Reader(dcp.FileSystemReader):
    """torch's reader, but the pickled index of the shards may refer to nothing that could be executed."""

    def read_metadata(self, *_: Any, **__: Any) -> dcp.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    """Allows torch.dtype and torch.Size, paths, and the dataclasses and enums that describe a sharded checkpoint."""

    MODULES = ("torch", "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
    NAMES = (
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),  # Python 3.13
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.NAMES:
            return super().find_class(module, name)
        if module in self.MODULES and "." not in name:  # a dotted name could reach another module
            value = super().find_class(module, name)
            is_plain = isinstance(value, type) and (dataclasses.is_dataclass(value) or issubclass(value, enum.Enum))
            if isinstance(value, torch.dtype) or (is_plain and value.__module__ == module != "torch"):
                return value
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in the index of a checkpoint")


def _check_lengths(folder: Path) -> None:
    """The files of a sharded checkpoint have no checksums, but their lengths are known."""
    for piece in _read_index(folder).storage_data.values():
        file = folder / piece.relative_path
        if not file.is_file() or file.stat().st_size < piece.offset + piece.length:
            raise DamagedCheckpoint(f"{folder}: damaged ({piece.relative_path} is missing or cut short)")
