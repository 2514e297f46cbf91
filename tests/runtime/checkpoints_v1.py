"""Checkpoints as version 0.1 wrote them."""

import torch
import torch.distributed.checkpoint as dcp


def write_file(folder, state):
    """`step-<step>.pt`, and the link `latest.pt`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:08d}.pt"
    torch.save(state, path)
    return link(path)


def write_folder(folder, state):
    """`step-<step>.dcp` of a sharded model, here by one process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']:08d}.dcp"
    tensors, rest = split(state)
    dcp.save(tensors, checkpoint_id=path, no_dist=True)
    torch.save(rest, path / "rest.pt")
    return link(path)


def link(path):
    latest = path.with_name("latest.pt")
    latest.unlink(missing_ok=True)
    latest.symlink_to(path.name)
    return path


def split(state):
    """The tensors of a nested state, and everything else."""
    tensors, rest = {}, {}
    for key, value in state.items():
        if isinstance(value, dict):
            tensors[key], rest[key] = split(value)
        else:
            (tensors if isinstance(value, torch.Tensor) else rest)[key] = value
    return tensors, rest
