"""Options of the comparison: data, pretraining, tasks and the models of each task."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from app.study.sections import GeneratorArguments
from tubelet.config import Config
from tubelet.runtime import run_lock


class Scenes(GeneratorArguments):
    """An entry of `scenes`: the arguments of `python -m tubelet.data.scenes.generate`."""

    pretrain: int = Field(3000, ge=0)
    """Videos without descriptions."""
    train: int = Field(3000, ge=0)
    """Described videos for training."""
    test: int = Field(500, ge=0)
    """Described videos for testing."""
    test_combinations: int = Field(500, ge=0)
    """Described videos for testing, whose pairs of color and shape no other split has."""
    sounding_train: int = Field(1000, ge=0)
    """Videos of two sprites, of which one is heard, for training."""
    sounding_test: int = Field(400, ge=0)
    """The same for testing."""
    size: int = Field(64, ge=1)
    """Height and width in pixels."""
    fps: int = Field(8, ge=1)
    """Frames per second."""
    sound: bool = True
    """Whether the files have sound."""
    seed: int = 0
    """Seed of all draws."""


class Pretrain(Config):
    """An entry of `pretrain`. In overrides, {folder} stands for the folder of the comparison."""

    fname: str
    """Configuration of the pretraining."""
    overrides: list[str] = []
    """Changes to it."""
    seconds: float = 300
    """Estimated duration, for the progress bar."""


class Row(Config):
    """An entry of `tasks.<name>.rows`: a model."""

    overrides: list[str] = []
    """Changes to the configuration of the task. {folder} and {seed} are filled in."""
    slower: float = 1.0
    """Duration compared with the task's `seconds`."""


class Task(Config):
    """An entry of `tasks`."""

    fname: str
    """Configuration of the task."""
    kind: Literal["captions", "answers", "retrieval", "accuracy"]
    """Which results are shown."""
    overrides: list[str] = []
    """Changes to it. {folder} and {seed} are filled in."""
    seconds: float = 100
    """Estimated duration of a run, for the progress bar."""
    rows: dict[str, Row] = Field(min_length=1)
    """The models that are compared."""


class Options(Config):
    """Compare models on tasks: frozen pretrained and random encoders, training end to end, models without the video."""

    app: Literal["comparison"] = "comparison"
    """Program that the file is for."""
    folder: str
    """Folder of data, runs and tables."""
    scenes: dict[str, Scenes]
    """Data sets of generated scenes, by their folder in `folder`."""
    pretrain: dict[str, Pretrain] = {}
    """Pretraining runs, by their folder in `folder`."""
    tasks: dict[str, Task] = Field(min_length=1)
    """What is learned, on data and encoders of this comparison."""
    seeds: list[int] = Field([0], min_length=1)
    """Seeds of the runs of each row; the tables have means and standard deviations."""
    only: dict[Literal["tasks", "rows"], list[str]] = {}
    """Names of `tasks` and `rows` to run, e.g. {tasks: [captions]}; by default all."""
    processes: int = Field(2, ge=1)
    """Number of programs that run in parallel."""
    threads: int = Field(1, ge=1)
    """Threads of each program."""

    @model_validator(mode="after")
    def _check_names(self) -> "Options":
        if twice := self.scenes.keys() & self.pretrain.keys():
            raise ValueError(f"pretrain: {twice.pop()} is the folder of a data set in `scenes`; choose another name")
        rows = {name for task in self.tasks.values() for name in task.rows}
        for key, known in (("tasks", set(self.tasks)), ("rows", rows)):
            if unknown := set(self.only.get(key, [])) - known:  # type: ignore[call-overload]
                raise ValueError(f"only.{key}: {unknown.pop()} is unknown; there are {', '.join(sorted(known))}")
        return self

    def run_locks(self) -> list[run_lock.Lock]:
        """Return what this program locks; its children lock their folders."""
        return [run_lock.Lock(Path(self.folder), name=".lock-comparison")]

    def fill(self, overrides: list[str], **values: Any) -> list[str]:
        """Return overrides with the folder and further values filled in."""
        filled = []
        for text in overrides:
            for name, value in {"folder": self.folder, **values}.items():
                text = text.replace(f"{{{name}}}", str(value))
            filled.append(text)
        return filled

    def selected(self) -> list[tuple[str, str]]:
        """Return the tasks and rows to run."""
        return [
            (task, row)
            for task, t in self.tasks.items()
            for row in t.rows
            if task in self.only.get("tasks", [task]) and row in self.only.get("rows", [row])
        ]
