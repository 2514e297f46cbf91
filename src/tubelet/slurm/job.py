"""What a job runs on the nodes: each of its processes calls a pickled `Job`."""

import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.runtime import distributed
from tubelet.runtime.launch import Package, load
from tubelet.slurm.attempts import Attempt


class TooManyRequeues(Exception):
    """The job has been started again as often as it may."""


@dataclass(frozen=True)
class Job:
    """A program with the configuration in `fname`. Relative paths in there are meant from `directory`."""

    package: Package
    fname: str
    logs: str
    directory: str
    on_cpu: bool
    max_requeues: int

    def __call__(self) -> None:
        """Run the program as the process that srun has started here.

        A program that a signal has stopped ends this process with exit status 0: with any other one, srun would kill
        the processes that are still saving. What happens to the job then is decided after all of them, see
        `tubelet.slurm.requeue`.
        """
        attempt = Attempt.current(Path(self.logs))

        def tell(kind: Any, error: BaseException, trace: Any) -> None:
            sys.__excepthook__(kind, error, trace)
            attempt.note_end(error="".join(traceback.format_exception(kind, error, trace)))

        # Python calls it at the end, the watchdog sooner: it ends a process that has failed before Python can.
        sys.excepthook = tell
        # submitit's own handlers would requeue at once. Programs that finish their step first set theirs later.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, _leave)
        if os.environ["SLURM_PROCID"] == "0":
            attempt.note_start()
        try:
            if attempt.number > self.max_requeues:
                raise TooManyRequeues(f"started again {attempt.number} times, slurm.max_requeues={self.max_requeues}")
            program = load(self.package, self.fname, [])
            os.chdir(self.directory)
            program.run(distributed.init_from_environment(on_cpu=self.on_cpu))
        except SystemExit as stop:
            if stop.code not in (128 + signal.SIGTERM, 128 + signal.SIGUSR2):
                attempt.note_end(error=f"SystemExit: {stop.code}")
                raise
            attempt.note_end(signal=stop.code - 128)
            raise SystemExit(0) from None


def _leave(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)
