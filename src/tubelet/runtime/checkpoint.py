"""Checkpoints of a run: complete or absent, verified, the last good ones kept.

A checkpoint is a folder `checkpoints/step-<step>/`, see `checkpoint_format`; the link `latest` names the newest. Those
of Tubelet 0.1, `step-<step>.pt` and `step-<step>.dcp`, are read alike, see `checkpoint_v1`.

Example:
    state = CheckpointState({"encoder": encoder.state_dict()}, optimizer.state_dict(), {"config": config})
    save(folder / "checkpoints", step=10, state=state, keep=3)
    path = newest(folder / "checkpoints")  # verifies the checksums: once, in rank 0
    load_weights(encoder, read_weights(path, ["encoder"])["encoder"], "encoder of the checkpoint")
"""

import contextlib
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from tubelet.runtime import checkpoint_format, checkpoint_v1
from tubelet.runtime.checkpoint_format import CheckpointError, CheckpointState, DamagedCheckpoint, Snapshot

__all__ = ["CheckpointError", "CheckpointState", "DamagedCheckpoint"]

logger = logging.getLogger(__name__)

LATEST = "latest"
_LATEST_V1 = "latest.pt"
_NAME = re.compile(r"step-(\d{8,})(\.pt|\.dcp)?")


# ---------------------------------------------------------------- writing


def save(folder: Path, step: int, state: CheckpointState, keep: int) -> Path:
    """Write `folder/step-<step>/`, let the link `folder/latest` name it, and remove all but the last `keep`.

    A kill at any moment leaves the previous checkpoint complete. Of a sharded model use `checkpoint_writer.Saver`.
    """
    return write(folder, step, Snapshot(state), keep)


def write(
    folder: Path,
    step: int,
    snapshot: Snapshot,
    keep: int,
    rank: int = 0,
    world_size: int = 1,
    on_all_ranks: Callable[[Callable[[], Any]], list[Any]] = lambda action: [action()],
    keep_steps: Collection[int] = (),
) -> Path:
    """Write one checkpoint, by all processes together; see `save`.

    Args:
        folder: Folder of the checkpoints.
        step: Step of the checkpoint.
        snapshot: The part of the state that this process writes.
        keep: Number of checkpoints that are kept.
        rank: Rank of this process.
        world_size: Number of processes that write.
        on_all_ranks: Calls its argument in every process and returns the results by rank; if the call fails in any
            process, raises in all.
        keep_steps: Steps whose checkpoints are kept besides.
    """
    path = folder / f"step-{step:08d}"
    unfinished = path.with_name(path.name + ".tmp")
    is_main = rank == 0
    try:
        on_all_ranks(lambda: _prepare(folder, unfinished) if is_main else None)
        written = on_all_ranks(lambda: snapshot.write(unfinished, rank, world_size))
        files = {name: entry for of_rank in written for name, entry in of_rank.items()}

        def commit() -> None:
            snapshot.write_metadata(unfinished, step, files)
            _commit(unfinished, path, keep, keep_steps)

        on_all_ranks(lambda: commit() if is_main else None)
    except BaseException:
        if is_main:
            with contextlib.suppress(OSError):  # the first error is the one to report
                remove(unfinished)
        raise
    return path


def _prepare(folder: Path, unfinished: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*.tmp"):  # of a process that was killed
        remove(leftover)
    unfinished.mkdir()


def _commit(unfinished: Path, path: Path, keep: int, keep_steps: Collection[int]) -> None:
    replaced = path.with_name(path.name + ".old.tmp")
    if path.exists():
        os.replace(path, replaced)
    os.replace(unfinished, path)
    remove(replaced)
    _link_latest(path)
    for old in [other for other in find(path.parent) if step_of(other) not in keep_steps][:-keep]:
        remove(old)
    checkpoint_format.flush(path.parent)


def _link_latest(path: Path) -> None:
    link = path.with_name(LATEST + ".tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, path.with_name(LATEST))
    path.with_name(_LATEST_V1).unlink(missing_ok=True)  # it names an older one; `locate` takes either name


def remove(path: Path) -> None:
    """Delete a checkpoint. A kill leaves nothing that could be taken for a checkpoint."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if path.suffix != ".tmp":
        path = path.rename(path.with_name(path.name + ".old.tmp"))
    shutil.rmtree(path)


# ---------------------------------------------------------------- finding


def find(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, not verified."""
    paths = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(paths, key=lambda path: (step_of(path), path.suffix == ""))


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint")
    return int(match[1])


def newest(folder: Path) -> Path | None:
    """The newest intact checkpoint of `folder`; None if it has none. Verifies all checksums, so call it in one process.

    A damaged one is reported and set aside as `*.damaged`, and the one before it is used.

    Raises:
        CheckpointError: All are damaged, now or at an earlier call, or were removed. A run never silently starts again
            from step 0.
    """
    for path in reversed(find(folder)):
        try:
            check_intact(path)
        except DamagedCheckpoint as error:
            logger.warning("%s\n  renamed to %s; using the checkpoint before it", error, _set_aside(path).name)
        else:
            return path
    if damaged := sorted(path.name for path in folder.glob("step-*.damaged*")):
        raise CheckpointError(
            f"{folder}: all checkpoints are damaged ({', '.join(damaged)}). Restore one, or choose another `folder:` "
            "to start a new run"
        )
    links = [link for name in (LATEST, _LATEST_V1) if (link := folder / name).is_symlink()]
    if not folder.exists():
        links += [folder] if folder.is_symlink() else []
    if links:
        raise CheckpointError(
            f"{links[0]} names {os.readlink(links[0])}, which is not there, nor is another checkpoint. Restore it, "
            "choose another `folder:` to start a new run, or remove the link to begin this one again"
        )
    return None


def _set_aside(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{suffix}") for suffix in itertools.chain([""], itertools.count(2)))
    return path.rename(next(name for name in names if not name.exists()))


def is_latest(path: Path) -> bool:
    """Whether a path denotes the newest checkpoint of its folder, as `latest` and 0.1's `latest.pt` do."""
    return path.name in (LATEST, _LATEST_V1)


def locate(path: Path) -> Path:
    """Resolve `path` to a checkpoint: itself, or the newest of a run folder by name. It is not verified.

    Args:
        path: A run folder, its folder `checkpoints`, a checkpoint of any version, or `checkpoints/latest` (of 0.1:
            `checkpoints/latest.pt`).

    Raises:
        CheckpointError: There is none.
    """
    if is_latest(path) and not path.exists():  # a link that was removed, or names a removed one
        path = path.parent
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    path = path.resolve() if path.is_symlink() else path
    if path.is_file() or _NAME.fullmatch(path.name):
        return path
    for folder in (path / "checkpoints", path):
        if paths := find(folder):
            return paths[-1]
    raise CheckpointError(f"{path}: neither a run folder (checkpoints/step-…) nor a checkpoint")


# ---------------------------------------------------------------- reading


def check_intact(path: Path, kind: str = "") -> None:
    """Verify the sizes and checksums of all files, or of one kind only: `weights` or `optimizer`.

    Raises:
        DamagedCheckpoint: A file is missing, cut short or changed.
    """
    _version(path).check_intact(path, kind)


def parts(path: Path) -> list[str]:
    """Names of the state dicts in a checkpoint."""
    return _version(path).parts(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """What was saved as `metadata`, and `step`. Reads no weights."""
    return _version(path).read_metadata(path)


def read_weights(
    path: Path, names: Iterable[str] | None = None, like: Mapping[str, Mapping[str, Tensor]] | None = None
) -> dict[str, dict[str, Tensor]]:
    """State dicts of the parts `names`, of all where it is None. Checksums are not verified, see `newest`.

    Args:
        like: State dicts of a sharded model. What is a DTensor there is read as this process's shard of it, everything
            else as the full tensor.

    Raises:
        CheckpointError: There is no such part, or the files are damaged.
    """
    known = parts(path)
    names = known if names is None else list(names)
    if missing := [name for name in names if name not in known]:
        raise CheckpointError(f"{path}: no {', '.join(missing)} in it; it holds {', '.join(known)}")
    return _version(path).read_weights(path, names, like or {})


def read_optimizer(path: Path, like: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The optimizer state, None where none was saved. `like`: that of a sharded model, see `read_weights`."""
    return _version(path).read_optimizer(path, like)


def read(path: Path, like: CheckpointState | None = None) -> CheckpointState:
    """Everything in a checkpoint; see `read_weights` and `read_optimizer`."""
    like = like or CheckpointState()
    return CheckpointState(
        read_weights(path, like=like.weights), read_optimizer(path, like.optimizer), read_metadata(path)
    )


def _version(path: Path) -> ModuleType:
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.is_file() or path.resolve().suffix == ".dcp":
        return checkpoint_v1
    return checkpoint_format


# ---------------------------------------------------------------- loading


def load_weights(module: torch.nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load full tensors or shards into `module`. `what`: what the state is, for the message.

    Raises:
        CheckpointError: Lists what is missing or unexpected and which shapes differ.
    """
    expected = module.state_dict()
    problems = [f"  missing: {name}" for name in expected if name not in state]
    problems += [f"  unexpected: {name}" for name in state if name not in expected]
    problems += [
        f"  shape of {name}: {tuple(state[name].shape)} in the file, {tuple(expected[name].shape)} in the model"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    if problems:
        more = [f"  … and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise CheckpointError("\n".join([f"{what} does not match the model:", *problems[:20], *more]))
    is_full = not any(isinstance(tensor, DTensor) for tensor in state.values())
    set_model_state_dict(module, dict(state), options=StateDictOptions(full_state_dict=is_full))


def check_complete(metadata: Mapping[str, Any], names: Iterable[str], path: Path) -> None:
    """Raises CheckpointError if the metadata of a checkpoint lacks what a run needs to go on."""
    if missing := [name for name in names if name not in metadata]:
        raise CheckpointError(
            f"{path}: its metadata has no {', '.join(missing)}, so the run cannot be continued. Restore another "
            "checkpoint, or choose another folder=…"
        )


def check_same_batch_size(metadata: Mapping[str, Any], current: int, key: str) -> None:
    """Raises CheckpointError if the steps of all processes together take another number of samples than before."""
    saved = metadata.get("global_batch")
    if saved is None:
        logger.warning(
            "the checkpoint does not say how many samples a step takes; the run continues with %d, and is another one "
            "unless that is the number it had",
            current,
        )
    elif saved != current:
        raise CheckpointError(
            f"the run's steps take {saved} samples, {key} times the number of processes is {current} here. Change one "
            "of them, or choose another folder=…"
        )
