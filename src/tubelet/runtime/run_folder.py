"""The folder of a run: everything that it writes is in there, and nothing is written elsewhere."""

import contextlib
import itertools
import json
import logging
import math
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tubelet.config import Config, ConfigError, UserError, dump
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

    Opening a folder again continues its log at `step`: lines of steps that will be taken again are dropped. At step 0,
    the log of an earlier start, which was killed before it had saved anything, is kept as `log-<n>.jsonl`. Raises
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
        with _explaining_full_disks(self.path):
            write_atomic(self.path / "config.yaml", dump(options))
            _record_code(self.path / "git.txt", continues=step > 0)
            lines = read_log(self.path)
            kept = [line for line in lines if line["step"] <= step]
            if step == 0 and any(line["step"] > 0 for line in lines):
                logger.warning(
                    "%s: an earlier start took %d steps and saved none of them; this one begins again, and the earlier "
                    "log is kept as %s",
                    self.path, max(line["step"] for line in lines), _set_aside(self.path / "log.jsonl").name,
                )  # fmt: skip
                kept = []
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
            with _explaining_full_disks(self.path):
                self._log.write(json.dumps(line | events) + "\n")
            metrics = {k: v for k, v in line.items() if k not in ("step", "last_step") and v is not None}
            for metric_logger in list(self.loggers):
                try:
                    metric_logger.log(line["step"], metrics)
                except Exception:
                    logger.warning("%s failed and is not used any more", type(metric_logger).__name__, exc_info=True)
                    self.loggers.remove(metric_logger)
        with _explaining_full_disks(self.path):
            self._log.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # `log` has raised it already
            self._log.close()
        for metric_logger in self.loggers:
            try:
                metric_logger.close()
            except Exception:
                logger.warning("%s could not be closed", type(metric_logger).__name__, exc_info=True)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `log.jsonl` as far as they are complete; a last line that a kill cut short is left out.

    Other lines that are no metrics of a step, e.g. after an edit, are left out with a warning.
    """
    path = folder / "log.jsonl"
    if not path.is_file():
        return []
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines, damaged = [], []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        elif number < len(texts):
            damaged.append(number)
    if damaged:
        more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
        logger.warning(
            "%s: left out %s%s, which are no JSON objects with a step",
            path, ", ".join(f"line {number}" for number in damaged[:5]), more,
        )  # fmt: skip
    return lines


def _set_aside(log: Path) -> Path:
    names = (log.with_name(f"{log.stem}-{number}{log.suffix}") for number in itertools.count(1))
    return log.rename(next(name for name in names if not name.exists()))


@contextlib.contextmanager
def _explaining_full_disks(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: the log cannot be written ({error.strerror}). Checkpoints are complete: make the folder writable "
            "or make room, and start the same command again"
        ) from None


def _record_code(file: Path, continues: bool) -> None:
    """Write `git.txt`; warn where the run continues with other code."""
    earlier, now = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else "", git_state()
    if continues and earlier and earlier != now:
        then, here = earlier.partition("\n")[0], now.partition("\n")[0]
        change = f"revision {then} then, {here} now" if then != here else "other uncommitted changes"
        logger.warning("%s: the run continues with other code than before: %s, see git.txt", file.parent, change)
    write_atomic(file, now)


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
    differing = differences(_read_configuration(earlier), options)
    if differing:
        raise ConfigError(
            "\n".join([f"{path} holds a run of another configuration:", *(f"  {line}" for line in differing)])
            + "\nChoose another folder=…, or remove that one"
            + ("; to start from its weights, use init_from=…" if "init_from" in type(options).model_fields else "")
        )


def _read_configuration(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except ConfigError as error:
        problem = " ".join(str(error).split())
    else:
        if isinstance(content, dict):
            return content
        problem = "it is empty" if content is None else "it is not a mapping of keys to values"
    raise ConfigError(
        f"{path}: it is damaged ({problem}), so whether the run in {path.parent} is that of this command is not known. "
        "Restore it, remove it to continue with the configuration of this command, or choose another folder=…"
    )
