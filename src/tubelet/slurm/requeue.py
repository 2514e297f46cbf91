"""The last line of a job's script: shall the job, whose processes have all ended, start again under the same id?

    python -m tubelet.slurm.requeue --logs <folder> --status <of srun> --max-requeues <number>

This is asked after the processes, not in one of them, so that none is killed while another still saves. A job goes on
when its processes were stopped by the warning before the limit, by the limit itself or by preemption; not when its code
raised, when it was cancelled, or when someone sent it SIGTERM. Of node failures SLURM takes care itself.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from tubelet.slurm import cluster
from tubelet.slurm.attempts import Attempt

TRIES, SECONDS_BETWEEN = 5, 5.0


def main(logs: Path, status: int, max_requeues: int) -> int:
    """Requeue the job that this process belongs to, or not; returns the exit status that the job shall have."""
    attempt = Attempt.current(logs)
    if not attempt.ended.is_file():
        return status
    number = json.loads(attempt.ended.read_text(encoding="utf-8")).get("signal")
    if number is None:
        return status or 1
    if not goes_on(number, _known(attempt.job)):
        return status or 128 + number
    if attempt.number >= max_requeues:
        print(f"not started again: slurm.max_requeues={max_requeues}. The same command continues.", file=sys.stderr)
        return status or 128 + number
    subprocess.run(["scontrol", "requeue", attempt.job], check=True)
    return 0


def goes_on(number: int, job: dict[str, str]) -> bool:
    """Whether a job that signal `number` has stopped shall start again; `job` as `cluster.show` gives it."""
    if not job:  # only the warning before the limit says by itself why it came
        return number == signal.SIGUSR2
    if job["JobState"] == "RUNNING":  # nobody is ending it
        return number == signal.SIGUSR2 or job["PreemptTime"] != "None"
    return job["Reason"] == "TimeLimit"  # else someone has cancelled it


def _known(job: str) -> dict[str, str]:
    """What the controller knows; asked again while it does not answer, as it does when it is busy or starts anew."""
    for _ in range(TRIES):
        if known := cluster.show(job):
            return known
        time.sleep(SECONDS_BETWEEN)
    return {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--max-requeues", type=int, required=True)
    arguments = parser.parse_args()
    sys.exit(main(arguments.logs, arguments.status, arguments.max_requeues))
