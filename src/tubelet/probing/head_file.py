"""A trained head in a file: safetensors, whose header holds as JSON how the head was built."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tubelet.probing.heads import Head, rebuild_head
from tubelet.runtime import checkpoint
from tubelet.runtime.files import write_atomic

NAME = "probe.safetensors"
"""In the folder of a probe."""
KEY = "probe"
"""Of the header's metadata."""


def write(path: Path, head: Head, config: dict[str, Any]) -> None:
    """Write a head of `build_head`, with the configuration of its probe for the record."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    write_atomic(path, save(tensors, metadata={KEY: json.dumps({"built_from": head.built_from, "config": config})}))


def read(path: Path) -> Head:
    """The head that `write` wrote. Raises CheckpointError where the file is damaged or holds something else."""
    try:
        with safe_open(path, "pt") as file:
            description = (file.metadata() or {}).get(KEY)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it cannot be iterated
    except (SafetensorError, OSError) as error:
        raise checkpoint.CheckpointError(f"{path}: damaged, or not a safetensors file ({error})") from error
    if description is None:
        raise checkpoint.CheckpointError(f"{path}: no probe in it; it holds {', '.join(state)}")
    return build(json.loads(description)["built_from"], state, path)


def build(built_from: dict[str, Any], state: dict[str, Tensor], path: Path) -> Head:
    """The head of `built_from` with the weights `state`, read from `path`."""
    head = rebuild_head(built_from)
    checkpoint.load_weights(head, state, f"probe of {path}")
    return head
