"""Requeues a job, if it should resume; the last command of its script.

    python -m tubelet.slurm.requeue --logs <folder> --status <of srun> --max-requeues <number>

It runs after all processes of the job have ended, so that none is killed while it saves. A job is requeued if its
processes were stopped by the signal before the time limit, by the limit itself or by preemption; not if its code
raised an exception, if it was cancelled, or if someone sent it SIGTERM. After a node failure SLURM requeues it itself.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from tubelet.slurm import cluster
from tubelet.slurm.attempt import Attempt

TRIES, SECONDS_BETWEEN = 5, 5.0


def main(logs: Path, status: int, max_requeues: int) -> int:
    """Requeue the job that this process belongs to if it should resume; returns the exit status of the job."""
    attempt = Attempt.current(logs)
    if not attempt.end_file.is_file():
        return status
    number = json.loads(attempt.end_file.read_text(encoding="utf-8")).get("signal")
    if number is None:
        return status or 1
    if not should_resume(number, _show(attempt.job)):
        return status or 128 + number
    if attempt.number >= max_requeues:
        print(f"not requeued: slurm.max_requeues={max_requeues}. The same command continues the run.", file=sys.stderr)
        return status or 128 + number
    subprocess.run(["scontrol", "requeue", attempt.job], check=True)
    return 0


def should_resume(number: int, job: dict[str, str]) -> bool:
    """Whether to requeue a job that signal `number` stopped. `job`: the result of `cluster.show`."""
    if not job:  # unknown; only the signal before the time limit has a single cause
        return number == signal.SIGUSR2
    if job["JobState"] == "RUNNING":  # nothing is ending it
        return number == signal.SIGUSR2 or job["PreemptTime"] != "None"
    return job["Reason"] == "TimeLimit"  # else it was cancelled


def _show(job: str) -> dict[str, str]:
    """`cluster.show`, repeated while the controller does not respond, e.g. because it is busy or restarting."""
    for _ in range(TRIES):
        if shown := cluster.show(job):
            return shown
        time.sleep(SECONDS_BETWEEN)
    return {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--status", type=int, required=True)
    parser.add_argument("--max-requeues", type=int, required=True)
    arguments = parser.parse_args()
    sys.exit(main(arguments.logs, arguments.status, arguments.max_requeues))
