"""What a job leaves of each of its starts."""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Attempt:
    """A start of a job: the first is number 0, and each requeueing makes another one under the same job id.

    `<job>_started-<number>.json` says when and where. `<job>_ended-<number>.json` says why the first process that did
    not come to its end left: what others say after it may be but its consequence.
    """

    logs: Path
    job: str
    number: int

    @classmethod
    def current(cls, logs: Path) -> "Attempt":
        """Of the job that this process belongs to."""
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        return cls(logs, job, int(os.environ.get("SLURM_RESTART_COUNT", 0)))

    @property
    def started(self) -> Path:
        return self.logs / f"{self.job}_started-{self.number}.json"

    @property
    def ended(self) -> Path:
        return self.logs / f"{self.job}_ended-{self.number}.json"

    def note_start(self) -> None:
        note = {"time": time.time(), "nodes": os.environ["SLURM_JOB_NODELIST"]}
        self.started.write_text(json.dumps(note), encoding="utf-8")

    def note_end(self, **why: Any) -> None:
        """signal=number or error=traceback; only the first process is heard."""
        note = {"rank": int(os.environ["SLURM_PROCID"]), "host": socket.gethostname(), "time": time.time(), **why}
        aside = self.ended.with_suffix(f".{note['rank']}.tmp")
        aside.write_text(json.dumps(note), encoding="utf-8")
        try:
            os.link(aside, self.ended)  # whole at once, and only where there is none yet
        except FileExistsError:
            pass
        finally:
            aside.unlink()
