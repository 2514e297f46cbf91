"""The content of one checkpoint: safetensors files and JSON in a folder.

- `weights.safetensors`: tensors named `<part>.<name>`, such as `encoder.blocks.0.norm1.weight`.
- `optimizer.safetensors`: the tensors of the optimizer state; `optimizer.json`: everything else of it.
- `metadata.json`: step, format version, parts, the caller's metadata, and size and CRC-32 of each other file.

Of a sharded model each process writes its local shards, `weights-00001-of-00004.safetensors` and so on. The header of
each file says which part of which full tensor a shard is, so that any number of processes can read them.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.tensor import DTensor

from tubelet.config import UserError
from tubelet.runtime.files import save_tensors
from tubelet.runtime.parallelize import local_shard

VERSION = 2  # version 1 is that of Tubelet 0.1, see checkpoint_v1.py
METADATA = "metadata.json"
OPTIMIZER = "optimizer.json"


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message names the file and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint of which a file is missing, cut short or changed."""


@dataclass
class CheckpointState:
    """What a checkpoint holds.

    Attributes:
        weights: State dict of each part of the model, by the part's name (which has no dot).
        optimizer: Nested dicts, lists and tuples of tensors and JSON values, such as an optimizer's state dict.
        metadata: JSON values.
    """

    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class _Shard:
    """A full tensor, or the shard of it that this process holds, in host memory."""

    tensor: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


class Snapshot:
    """A copy in host memory of the part of a state that this process writes; training can go on meanwhile.

    Args:
        state: The state. Tensors that are not sharded are copied by rank 0 only.
        rank: Rank of this process.
        buffers: Memory of earlier snapshots by name, which is reused where it fits, and updated: the first access to
            new memory takes several times as long as copying.
    """

    def __init__(self, state: CheckpointState, rank: int = 0, buffers: dict[str, Tensor] | None = None):
        buffers = {} if buffers is None else buffers
        if wrong := [part for part in state.weights if "." in part]:
            raise ValueError(f"names of parts must not have dots: {', '.join(wrong)}")
        self.parts, self.metadata = list(state.weights), state.metadata
        weights = {
            f"{part}.{name}": tensor for part, tensors in state.weights.items() for name, tensor in tensors.items()
        }
        moments: dict[str, Tensor] = {}
        self.optimizer = None if state.optimizer is None else _to_json(state.optimizer, "", moments)
        self.shards = {
            kind: _to_host(tensors, kind, rank, buffers)
            for kind, tensors in (("weights", weights), ("optimizer", moments))
        }
        used = {f"{kind}/{name}" for kind, shards in self.shards.items() for name in shards}
        for name in buffers.keys() - used:
            del buffers[name]

    def write(self, folder: Path, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
        """Write this process's files into `folder` and flush them; returns the size and CRC-32 of each, by name."""
        names = []
        suffix = "" if world_size == 1 else f"-{rank + 1:05d}-of-{world_size:05d}"
        for kind, shards in self.shards.items():
            name = f"{kind}{suffix}.safetensors"
            layout = {name: [shard.shape, shard.offsets] for name, shard in shards.items()}
            tensors = {name: shard.tensor for name, shard in shards.items()}
            save_tensors(folder / name, tensors, {"shards": json.dumps(layout)})
            flush(folder / name)
            names.append(name)
        if rank == 0 and self.optimizer is not None:
            _write_flushed(folder / OPTIMIZER, json.dumps(self.optimizer))
            names.append(OPTIMIZER)
        return {name: _size_and_checksum(folder / name) for name in names}

    def write_metadata(self, folder: Path, step: int, files: dict[str, Any]) -> None:
        """Write metadata.json, after all other files of all processes."""
        content = {
            "format_version": VERSION,
            "step": step,
            "parts": self.parts,
            "metadata": {**self.metadata, "step": step},
            "files": dict(sorted(files.items())),
        }
        _write_flushed(folder / METADATA, json.dumps({**content, "crc32": _checksum_of(content)}, indent=1) + "\n")
        flush(folder)


def _to_host(tensors: dict[str, Tensor], kind: str, rank: int, buffers: dict[str, Tensor]) -> dict[str, _Shard]:
    """Copy the tensors that this process writes; they do not share memory, as safetensors requires."""
    offsets = _shard_offsets(tensors)
    shards = {}
    for name, tensor in tensors.items():
        local = local_shard(tensor)
        if (rank > 0 and local.shape == tensor.shape) or _is_replica(tensor):
            continue  # a lower rank has it, too
        buffer = buffers.get(f"{kind}/{name}")
        if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
            buffer = torch.empty(local.shape, dtype=local.dtype)
        buffers[f"{kind}/{name}"] = buffer.copy_(local.detach())
        shards[name] = _Shard(buffer, tuple(tensor.shape), offsets.get(name, (0,) * tensor.dim()))
    return shards


def _is_replica(tensor: Tensor) -> bool:
    """Whether the shard is a copy of that of a lower rank, as with HSDP in all groups of processes but the first."""
    if not isinstance(tensor, DTensor):
        return False
    coordinates = tensor.device_mesh.get_coordinate()
    assert coordinates is not None  # all processes are in the mesh
    return any(i > 0 and p.is_replicate() for i, p in zip(coordinates, tensor.placements, strict=True))


def _shard_offsets(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the offsets of this process's shards in the full tensors, for the DTensors among `tensors`."""
    planner = DefaultSavePlanner()
    planner.set_up_planner({name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)})
    items = planner.create_local_plan().items
    return {item.index.fqn: tuple(item.tensor_data.chunk.offsets) for item in items if item.tensor_data is not None}


def _to_json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Convert `value` to JSON; move its tensors to `tensors` and replace them by references to their names."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, Mapping):
        items = [(key, _to_json(item, f"{name}/{key}" if name else str(key), tensors)) for key, item in value.items()]
        return dict(items) if all(isinstance(key, str) for key in value) else {"$items": items}
    if isinstance(value, list | tuple):
        items = [_to_json(item, f"{name}/{index}" if name else str(index), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    return value


def _from_json(value: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Invert `_to_json`; `tensor` returns the tensor of a name."""
    if isinstance(value, list):
        return [_from_json(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensor(value["$tensor"])
    if "$tuple" in value:
        return tuple(_from_json(value["$tuple"], tensor))
    items = value["$items"] if "$items" in value else value.items()
    return {key: _from_json(item, tensor) for key, item in items}


def _write_flushed(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size_and_checksum(path: Path) -> dict[str, Any]:
    size = checksum = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return {"size": size, "crc32": f"{checksum:08x}"}


def _checksum_of(content: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content).encode()):08x}"


# ---------------------------------------------------------------- reading


def check_intact(folder: Path, kind: str = "") -> None:
    """Raises DamagedCheckpoint if a file whose name begins with `kind` is missing, cut short or changed."""
    for name, expected in _content(folder)["files"].items():
        if name.startswith(kind):
            path = folder / name
            if not path.is_file():
                raise DamagedCheckpoint(f"{folder}: damaged ({name} is missing)")
            if path.stat().st_size != expected["size"]:
                raise DamagedCheckpoint(
                    f"{folder}: damaged ({name} has {path.stat().st_size} bytes instead of {expected['size']})"
                )
            if _size_and_checksum(path) != expected:
                raise DamagedCheckpoint(f"{folder}: damaged (wrong checksum of {name})")


def parts(folder: Path) -> list[str]:
    return _content(folder)["parts"]


def read_metadata(folder: Path) -> dict[str, Any]:
    return _content(folder)["metadata"]


def read_weights(
    folder: Path, names: Iterable[str], like: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, dict[str, Tensor]]:
    names = list(names)
    weights: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    reader = _Reader(folder, "weights", {f"{part}.{name}": x for part in like for name, x in like[part].items()})
    for full_name in reader.names:
        part, _, name = full_name.partition(".")
        if part in weights:
            weights[part][name] = reader.read(full_name)
    return weights


def read_optimizer(folder: Path, like: dict[str, Any] | None) -> dict[str, Any] | None:
    if not (folder / OPTIMIZER).is_file():
        return None
    templates: dict[str, Tensor] = {}
    _to_json(like or {}, "", templates)
    try:
        content = json.loads((folder / OPTIMIZER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise damaged(folder, error) from error
    return _from_json(content, _Reader(folder, "optimizer", templates).read)


class _Reader:
    """The tensors in the files of one kind, `weights` or `optimizer`.

    A tensor whose namesake in `like` is sharded in the same shape is read as this process's shard, any other one as the
    full tensor.
    """

    def __init__(self, folder: Path, kind: str, like: Mapping[str, Tensor]):
        self.folder, self.like = folder, like
        self.offsets = _shard_offsets(like)
        self.shape: dict[str, tuple[int, ...]] = {}
        self.shards: dict[str, list[tuple[Any, tuple[int, ...]]]] = {}
        try:
            for path in sorted(folder.glob(f"{kind}*.safetensors")):
                file = safe_open(path, framework="pt")
                for name, (shape, offsets) in json.loads(file.metadata()["shards"]).items():
                    self.shape[name] = tuple(shape)
                    self.shards.setdefault(name, []).append((file, tuple(offsets)))
        except (SafetensorError, ValueError, TypeError, KeyError) as error:
            raise damaged(folder, error) from error

    @property
    def names(self) -> list[str]:
        return list(self.shape)

    def read(self, name: str) -> Tensor:
        if name not in self.shape:
            raise DamagedCheckpoint(f"{self.folder}: damaged (no tensor {name})")
        like = self.like.get(name)
        if not isinstance(like, DTensor) or tuple(like.shape) != self.shape[name]:
            return self._region(name, (0,) * len(self.shape[name]), self.shape[name])
        shard = like.to_local()
        # A shard without elements has no offsets.
        local = self._region(name, self.offsets.get(name, (0,) * shard.dim()), tuple(shard.shape))
        return DTensor.from_local(
            local.to(shard.device), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
        )

    def _region(self, name: str, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Read the part of the full tensor that begins at `start` from the shards that overlap it."""
        region, filled = None, 0
        for file, offsets in self.shards[name]:
            shard = file.get_slice(name)
            shape = tuple(shard.get_shape())
            if (offsets, shape) == (start, size):
                return file.get_tensor(name)
            first = [max(pair) for pair in zip(start, offsets, strict=True)]
            end = [min(a + b, c + d) for a, b, c, d in zip(start, size, offsets, shape, strict=True)]
            if all(a < b for a, b in zip(first, end, strict=True)):
                tensor = shard[tuple(slice(a - o, b - o) for a, b, o in zip(first, end, offsets, strict=True))]
                region = tensor.new_empty(size) if region is None else region
                region[tuple(slice(a - s, b - s) for a, b, s in zip(first, end, start, strict=True))] = tensor
                filled += tensor.numel()
        if region is None:
            file, _ = self.shards[name][0]
            region = file.get_tensor(name).new_empty(size)
        if filled != region.numel():
            raise DamagedCheckpoint(f"{self.folder}: damaged ({name} is incomplete)")
        return region


def _content(folder: Path) -> dict[str, Any]:
    """Read metadata.json and verify its checksum."""
    try:
        content = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        checksum = content.pop("crc32")
    except (FileNotFoundError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged(folder, error) from error
    if _checksum_of(content) != checksum:
        raise DamagedCheckpoint(f"{folder}: damaged (wrong checksum of {METADATA})")
    if content["format_version"] > VERSION:
        raise CheckpointError(
            f"{folder}: its format is version {content['format_version']}; this Tubelet reads up to {VERSION}. "
            "Install a newer version"
        )
    return content


def damaged(path: Path, error: Exception) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{path}: damaged, or not a checkpoint ({type(error).__name__}: {error})")
