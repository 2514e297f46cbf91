"""Files that record each start of a job and why it ended."""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.runtime.files import write_json, write_once


@dataclass(frozen=True)
class Attempt:
    """One start of a job: the first has number 0; each requeue of the same job adds one.

    `<job>_started-<number>.json` has the time and the nodes. `<job>_ended-<number>.json` has the reason why the first
    process ended that did not finish; the other processes may end only as a consequence of it.
    """

    logs: Path
    job: str
    number: int

    @classmethod
    def current(cls, logs: Path) -> "Attempt":
        """The attempt that this process belongs to."""
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        return cls(logs, job, int(os.environ.get("SLURM_RESTART_COUNT", 0)))

    @property
    def start_file(self) -> Path:
        return self.logs / f"{self.job}_started-{self.number}.json"

    @property
    def end_file(self) -> Path:
        return self.logs / f"{self.job}_ended-{self.number}.json"

    def record_start(self) -> None:
        write_json(self.start_file, {"time": time.time(), "nodes": os.environ["SLURM_JOB_NODELIST"]})

    def record_end(self, **reason: Any) -> None:
        """Record `signal=<number>` or `error=<traceback>`, unless another process has recorded its end before."""
        rank = int(os.environ["SLURM_PROCID"])
        record = {"rank": rank, "host": socket.gethostname(), "time": time.time(), **reason}
        with contextlib.suppress(FileExistsError):
            write_once(self.end_file, json.dumps(record))
