"""Options of the program that writes an index of videos."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, Config
from tubelet.indexing.duplicates import MAX_DISTANCE
from tubelet.indexing.options import ReadingOptions
from tubelet.runtime.run_lock import Lock


class DuplicateOptions(Config):
    """YAML section `duplicates`."""

    max_distance: int | None = Field(6, ge=0, le=MAX_DISTANCE)
    """Videos whose perceptual hashes differ in at most so many of 64 bits are near-duplicates; null: do not search."""
    drop: bool = False
    """Write another index without them, `<name>.deduplicated.parquet`."""


class DataOptions(Config):
    """YAML section `data`."""

    datasets: list[str] = Field(min_length=1)
    """Folders (searched recursively), lists (one `path label` per line), other indexes or single video files."""


class Options(Config):
    """An index of videos."""

    app: Literal["index"] = "index"
    folder: str
    """Folder for the report, and for the index unless `index` is given. In a job array each task has its own."""
    index: str | None = None
    """The Parquet file; null: `index.parquet` in `folder`. Processes with the same file share the work."""
    data: DataOptions
    relative: bool = False
    """Name files below the index's folder by relative paths, so that the folder can be moved as a whole."""
    reading: ReadingOptions = ReadingOptions()
    duplicates: DuplicateOptions = DuplicateOptions()
    thumbnails: int = Field(24, ge=0)
    """Videos of which the report shows a frame, drawn at random."""
    processes: Annotated[int | None, RESUME_IGNORED] = Field(None, ge=1)
    """Processes that read files in each task; null: one for each core."""
    part_size: int = Field(500, ge=1)
    """Files of a part: what is lost when the program is killed, and what a task takes at once."""
    task: Annotated[int, RESUME_IGNORED] = 0
    """For job arrays: `--sweep task=0,1,2,3` starts four tasks."""

    @model_validator(mode="after")
    def _tasks_share_an_index(self) -> "Options":
        if self.task > 0 and self.index is None:
            raise ValueError(
                "index: tasks of an array share the work through this file; give index=/path/index.parquet"
            )
        return self

    def run_locks(self) -> list[Lock]:
        """Return what this program locks: processes with the same index share the work."""
        return [Lock(Path(self.folder), shared=True)]

    @property
    def index_path(self) -> Path:
        return Path(self.index or Path(self.folder) / "index.parquet")

    @property
    def num_processes(self) -> int:
        return self.processes or len(os.sched_getaffinity(0))
