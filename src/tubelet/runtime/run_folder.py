"""The folder of a run: everything that it writes is in there, and nothing is written elsewhere."""

import json
import logging
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tubelet.config import Config, ConfigError, dump
from tubelet.config.resume import differences
from tubelet.config.yaml_files import read_yaml
from tubelet.runtime.files import write_atomic

logger = logging.getLogger(__name__)

CODE = Path(__file__).resolve().parents[3]  # the checkout that runs, or its copy


class MetricLogger(Protocol):
    """Receives metrics besides `log.jsonl`, see `tubelet.training.loggers`."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the finite metrics of a step."""

    def close(self) -> None:
        """Write everything that is still buffered."""


class RunFolder:
    """`config.yaml` (resolved), `git.txt`, `log.jsonl`, `checkpoints/`, and the files of `loggers`.

    Opening a folder again continues its log at `step`: lines of steps that will be taken again are dropped. Raises
    ConfigError when the folder holds a run of another configuration, with the keys that differ; options with the marker
    `RESUME_IGNORED` may differ. Add loggers that write into the folder to `loggers` afterwards, so that they never
    touch the files of another run.
    """

    def __init__(self, folder: str | Path, options: Config, *, step: int, loggers: Sequence[MetricLogger] = ()):
        self.path = Path(folder)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"folder: {folder} cannot be created ({error.strerror}); choose another one") from None
        check_same_configuration(self.path, options)
        write_atomic(self.path / "config.yaml", dump(options))
        write_atomic(self.path / "git.txt", git_state())
        kept = [line for line in read_log(self.path) if line["step"] <= step]
        write_atomic(self.path / "log.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        self._log = open(self.path / "log.jsonl", "a", encoding="utf-8")
        self.loggers = list(loggers)

    def log(self, lines: list[dict[str, Any]]) -> None:
        """Append one JSON line for each step to `log.jsonl`, and give the same numbers to the loggers.

        The log also keeps `events`, name -> message.

        A logger that fails is removed with a warning, and the run continues: `log.jsonl` has all metrics.
        """
        for line in lines:
            # JSON has no NaN; a number that is not finite is null.
            events = {"events": line["events"]} if "events" in line else {}
            line = {name: value if math.isfinite(value) else None for name, value in line.items() if name != "events"}
            self._log.write(json.dumps(line | events) + "\n")
            metrics = {k: v for k, v in line.items() if k not in ("step", "last_step") and v is not None}
            for metric_logger in list(self.loggers):
                try:
                    metric_logger.log(line["step"], metrics)
                except Exception:
                    logger.warning("%s failed and is not used any more", type(metric_logger).__name__, exc_info=True)
                    self.loggers.remove(metric_logger)
        self._log.flush()

    def close(self) -> None:
        self._log.close()
        for metric_logger in self.loggers:
            try:
                metric_logger.close()
            except Exception:
                logger.warning("%s could not be closed", type(metric_logger).__name__, exc_info=True)


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

    def git(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(code), *args], capture_output=True, text=True, errors="replace")

    if git("rev-parse", "HEAD").returncode:
        return "not a git checkout\n"
    return "\n".join(git(*args).stdout for args in (("rev-parse", "HEAD"), ("status", "--short"), ("diff", "HEAD")))


def check_same_configuration(path: Path, options: Config) -> None:
    """Raise ConfigError, with the keys that differ, when the folder `path` holds a run of another configuration.

    Options whose fields have the marker `RESUME_IGNORED` may differ.
    """
    earlier = path / "config.yaml"
    if not earlier.is_file():
        return
    differing = differences(read_yaml(earlier), options)
    if differing:
        raise ConfigError(
            "\n".join([f"{path} holds a run of another configuration:", *(f"  {line}" for line in differing)])
            + "\nChoose another folder=…, or remove that one"
            + ("; to start from its weights, use init_from=…" if "init_from" in type(options).model_fields else "")
        )
