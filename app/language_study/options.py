"""Options of the comparison: data, pretraining, tasks and rows."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from tubelet.config import Config
from tubelet.runtime import run_lock


class Pretrain(Config):
    """YAML section `pretrain`."""

    fname: str
    overrides: list[str] = []
    seconds: float = 300
    """Estimated duration, for the progress bar."""


class Task(Config):
    """An entry of `tasks`. In overrides, {folder} stands for the folder of the comparison."""

    fname: str
    kind: Literal["captions", "answers", "retrieval"]
    """Which results are shown."""
    overrides: list[str] = []
    seconds: float = 100
    """Estimated duration of a run with a frozen encoder, for the progress bar."""


class Row(Config):
    """An entry of `rows`: a model for each task. {folder} and {seed} are filled in."""

    overrides: list[str] = []
    tasks: dict[str, list[str]] = {}
    """Further overrides of single tasks."""
    seeds: list[int] = Field([0], min_length=1)
    slower: float = 1.0
    """Duration compared with a frozen encoder's."""


class Options(Config):
    """A comparison of models that write about videos."""

    folder: str
    scenes: dict[str, int]
    """Arguments of `python -m tubelet.data.scenes.generate`, which writes `<folder>/scenes`."""
    pretrain: Pretrain
    tasks: dict[str, Task] = Field(min_length=1)
    rows: dict[str, Row] = Field(min_length=1)
    only: dict[str, list[str]] = {}
    """Names of `rows` and `tasks` to run, e.g. {tasks: [captions]}; by default all."""
    processes: int = Field(2, ge=1)
    threads: int = Field(1, ge=1)

    def run_locks(self) -> list[run_lock.Lock]:
        """Return what this program locks; its children lock their folders."""
        return [run_lock.Lock(Path(self.folder), name=".lock-language-study")]

    def fill(self, overrides: list[str], **values: Any) -> list[str]:
        """Return overrides with the folder and further values filled in."""
        filled = []
        for text in overrides:
            for name, value in {"folder": self.folder, **values}.items():
                text = text.replace(f"{{{name}}}", str(value))
            filled.append(text)
        return filled
