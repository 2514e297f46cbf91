"""Options of the program that packs videos."""

import os
from pathlib import Path
from typing import Annotated, Literal

import av
from pydantic import Field, model_validator

from tubelet.config import RESUME_IGNORED, Config
from tubelet.data.storage.options import StorageConfig
from tubelet.runtime.run_lock import Lock


class EncodingOptions(Config):
    """YAML section `encoding`."""

    short_side: int | None = Field(256, ge=16)
    """Pixels of the shorter side; smaller videos keep their size, and null keeps that of all."""
    fps: float | None = Field(None, gt=0)
    """Frames per second: of several frames in an interval the first is kept. null: all frames at their own times."""
    clip_seconds: float | None = Field(None, gt=0)
    """Cut videos into clips of this length; the last one of a video may be shorter. null: whole videos."""
    codec: str = "libx264"
    """An encoder of FFmpeg."""
    crf: int | None = Field(23, ge=0)
    """Quality of libx264, libx265 and the like; smaller is better. null: set it in `options`."""
    gop: int = Field(16, ge=1)
    """Largest distance of key frames; on average, a clip starts half of it after one."""
    options: dict[str, str] = {"preset": "medium", "tune": "fastdecode", "x264-params": "mbtree=0"}
    """Further options of the encoder. With its macroblock tree, x264 may encode the same frames to other bytes."""
    audio: bool = False
    """Copy the first audio stream; in clips, to the precision of its packets."""

    @model_validator(mode="after")
    def _codec_exists(self) -> "EncodingOptions":
        try:
            av.Codec(self.codec, "w")
        except av.codec.codec.UnknownCodecError:
            raise ValueError(f"codec {self.codec}: PyAV's FFmpeg has no such encoder; libx264 is one") from None
        return self


class VerificationOptions(Config):
    """YAML section `verification`: each clip is decoded again and compared with its source, scaled to its size."""

    frames: int = Field(4, ge=1)
    """At least so many evenly spaced frames are compared, or all of a shorter clip."""
    min_psnr: float = 25.0
    """Clips of a lower PSNR, in dB, are not written; they are listed with the unreadable videos."""


class DataOptions(Config):
    """YAML section `data`, with the keys of pretraining."""

    datasets: list[str] = Field(min_length=1)
    """Folders, lists (labels are kept), or single files; also remote ones."""
    storage: Annotated[StorageConfig, RESUME_IGNORED] = StorageConfig()


class Options(Config):
    """Shards, or files, of re-encoded videos."""

    app: Literal["pack"] = "pack"
    folder: Annotated[str, RESUME_IGNORED]
    """Folder of the shards, unless `output` is given."""
    output: str | None = None
    """Folder of the shards; for job arrays, in which every task has its own `folder`."""
    data: DataOptions
    """Videos to pack."""
    format: Literal["shards", "files"] = "shards"
    """WebDataset tar files, or a folder of mp4 files for each of them."""
    videos_per_shard: int = Field(100, ge=1)
    """A shard is what a process writes at once, and what is lost when it is killed."""
    encoding: EncodingOptions = EncodingOptions()
    verification: VerificationOptions = VerificationOptions()
    processes: Annotated[int | None, RESUME_IGNORED] = Field(None, ge=1)
    """Processes of each task, each with one thread; null: one per core."""
    timeout: Annotated[float, RESUME_IGNORED] = Field(3600, gt=0)
    """Seconds that a video may take before it counts as unreadable."""
    task: Annotated[int, RESUME_IGNORED] = Field(0, ge=0)
    """For job arrays: `--sweep task=0,1,2,3 tasks=4 output=/data/packed` starts four tasks that share the shards."""
    tasks: Annotated[int, RESUME_IGNORED] = Field(1, ge=1)
    """Number of tasks that share the shards; see `task`."""

    @model_validator(mode="after")
    def _task_exists(self) -> "Options":
        if self.task >= self.tasks:
            raise ValueError(f"task {self.task}: with tasks {self.tasks}, tasks are 0 to {self.tasks - 1}")
        return self

    def run_locks(self) -> list[Lock]:
        """Return what this program locks: the folder, which several tasks share, and its task there."""
        task = [Lock(self.output_folder, name=f".lock-{self.task}")] if self.tasks > 1 else []
        return [Lock(self.output_folder, shared=self.tasks > 1), *task]

    @property
    def output_folder(self) -> Path:
        return Path(self.output or self.folder)

    @property
    def num_processes(self) -> int:
        return self.processes or len(os.sched_getaffinity(0))
