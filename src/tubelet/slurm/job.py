"""The processes of a job: each calls a pickled `Job`."""

import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.runtime import distributed
from tubelet.runtime.launch import Package, load
from tubelet.slurm.attempt import Attempt


class TooManyRequeues(Exception):
    """The job has been requeued `slurm.max_requeues` times."""


@dataclass(frozen=True)
class Job:
    """A program with the configuration in `fname`. Relative paths in the configuration start at `directory`."""

    package: Package
    fname: str
    logs: str
    directory: str
    on_cpu: bool
    max_requeues: int

    def __call__(self) -> None:
        """Run the program in this process of the job.

        A process that a signal stops exits with status 0, because with any other status srun would kill the processes
        that are still saving. Whether the job is requeued is decided when all have ended, see `tubelet.slurm.requeue`.
        """
        attempt = Attempt.current(Path(self.logs))

        def record_exception(kind: Any, error: BaseException, trace: Any) -> None:
            sys.__excepthook__(kind, error, trace)
            attempt.record_end(error="".join(traceback.format_exception(kind, error, trace)))

        # Python calls it when the process ends; the watchdog calls it before it aborts the process.
        sys.excepthook = record_exception
        # submitit's handlers would requeue at once. Programs that finish their step first install theirs later.
        _handle_signals(_exit)
        if os.environ["SLURM_PROCID"] == "0":
            attempt.record_start()
        try:
            if attempt.number > self.max_requeues:
                raise TooManyRequeues(f"requeued {attempt.number} times, slurm.max_requeues={self.max_requeues}")
            program = load(self.package, self.fname, [])
            os.chdir(self.directory)
            program.run(distributed.init_from_environment(on_cpu=self.on_cpu))
        except SystemExit as stop:
            if stop.code not in (128 + signal.SIGTERM, 128 + signal.SIGUSR2):
                attempt.record_end(error=f"SystemExit: {stop.code}")
                raise
            attempt.record_end(signal=stop.code - 128)
            raise SystemExit(0) from None
        finally:
            # All is saved: a later signal, while Python shuts down, must not make the job fail.
            _handle_signals(signal.SIG_IGN)


def _handle_signals(handler: Any) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, handler)


def _exit(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
