"""The folder of a run: everything that it writes is in there, and nothing is written elsewhere."""

import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from tubelet.config import Config, ConfigError, dump
from tubelet.data import NORMALIZATION

CODE = Path(__file__).resolve().parents[3]  # the checkout that runs, or its copy


class RunFolder:
    """`config.yaml` (resolved), `git.txt`, `log.jsonl`, tensorboard events, and `checkpoints/`.

    Opening a folder again continues its log at `step`: lines of steps that will be taken again are dropped. Raises
    ConfigError when the folder holds a run of another configuration, with the keys that differ; keys under one of
    `free` (dotted prefixes) may differ.
    """

    def __init__(self, folder: str | Path, options: Config, *, step: int, free: tuple[str, ...] = ()):
        self.path = Path(folder)
        self.path.mkdir(parents=True, exist_ok=True)
        check_same_configuration(self.path, options, free)
        write_atomic(self.path / "config.yaml", dump(options))
        write_atomic(self.path / "git.txt", git_state())
        kept = [line for line in read_log(self.path) if line["step"] <= step]
        write_atomic(self.path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self._log = open(self.path / "log.jsonl", "a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(self.path / "tensorboard"), purge_step=step + 1)

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Append one JSON line a step to `log.jsonl`, and the same numbers to tensorboard."""
        for line in lines:
            # JSON has no NaN; a number that is not finite is null.
            line = {name: value if math.isfinite(value) else None for name, value in line.items()}
            self._log.write(json.dumps(line) + "\n")
            for name, value in line.items():
                if name not in ("step", "last_step") and value is not None:
                    self._tensorboard.add_scalar(name, value, line["step"])
        self._log.flush()

    def close(self) -> None:
        self._log.close()
        self._tensorboard.close()


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a kill leaves the old file or the new one, never half of it."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `log.jsonl`; a last line that a kill cut short is left out."""
    path = folder / "log.jsonl"
    if not path.is_file():
        return []
    *lines, _cut_short = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def git_state(code: Path = CODE) -> str:
    """Revision and uncommitted changes of the checkout `code`, or a line that says there is none.

    A copy of a checkout (`tubelet.slurm.snapshot`) has them in its file git.txt.
    """
    if (code / "git.txt").is_file():
        return (code / "git.txt").read_text(encoding="utf-8")
    if shutil.which("git") is None:
        return "git is not installed here\n"

    def say(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(code), *words], capture_output=True, text=True, errors="replace")

    if say("rev-parse", "HEAD").returncode:
        return "not a git checkout\n"
    return "\n".join(say(*words).stdout for words in (("rev-parse", "HEAD"), ("status", "--short"), ("diff", "HEAD")))


def check_same_configuration(path: Path, options: Config, free: tuple[str, ...]) -> None:
    """Raises ConfigError, with the keys that differ, when the folder `path` holds a run of another configuration."""
    earlier = path / "config.yaml"
    if not earlier.is_file():
        return
    old = dict(_leaves(yaml.safe_load(earlier.read_text(encoding="utf-8"))))
    new = dict(_leaves(yaml.safe_load(dump(options))))
    differing = [
        f"  {key}: {old.get(key)!r} there, {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not key.startswith(free) and not _filled_in(key, old.get(key), new.get(key))
    ]
    if differing:
        raise ConfigError(
            "\n".join([f"{path} holds a run of another configuration:", *differing])
            + "\nChoose another folder=…, or remove that one; to start from its weights, use init_from=…"
        )


def _filled_in(key: str, old: Any, new: Any) -> bool:
    """Whether a job's folder has as open what the program takes from its pretraining's file, or the other way round."""
    return key.rpartition(".")[2] in NORMALIZATION and None in (old, new)


def _leaves(node: Any, prefix: str = "") -> Any:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}{key}.")
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        for index, value in enumerate(node):
            yield from _leaves(value, f"{prefix}{index}.")
    else:
        yield prefix[:-1], node
