"""Shows and cancels the jobs of a folder."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError
from tubelet.runtime.files import read_json
from tubelet.runtime.text import text_table
from tubelet.runtime.watchdog import ABORTED
from tubelet.slurm import cluster
from tubelet.slurm.attempt import Attempt
from tubelet.slurm.submit import Submitted, logs, read_jobs

COLUMNS = ("job", "name", "state", "nodes", "restarts", "step", "loss", "clips/s", "left", "last error")


def table(root: Path) -> str:
    """One line for each job, and below the end of the first error of each failed job.

    A run that was submitted again has one log: its progress is shown with its newest job.
    """
    jobs = _jobs(root)
    newest = {job.folder: job.job for job in jobs}
    rows = [COLUMNS, *(_row(root, job, newest[job.folder] == job.job) for job in jobs)]
    return "\n".join([text_table(rows), *filter(None, (_failure(root, job) for job in jobs))])


def cancel(root: Path) -> str:
    """Cancel the jobs of the folder that are in the queue; returns a message with their ids."""
    queued = [job.job for job in _jobs(root) if is_queued(root, job)]
    if queued:
        subprocess.run(["scancel", *queued], check=True)
    return f"cancelled: {' '.join(queued)}" if queued else "no job of this folder is in the queue"


def _jobs(root: Path) -> list[Submitted]:
    jobs = read_jobs(root)
    if not jobs:
        raise ConfigError(f"{root}: no jobs.json in it; give the folder that the jobs were submitted with")
    cluster.check_installed()
    return jobs


def is_queued(root: Path, job: Submitted) -> bool:
    """Whether the job waits, runs or is ending."""
    live = cluster.show(job.job)
    # The output file identifies the job: a cluster that is set up again reuses the ids.
    return bool(live) and live["JobState"] in cluster.IN_QUEUE and Path(live["StdOut"]).parent == logs(root)


def _row(root: Path, job: Submitted, newest: bool) -> tuple[str, ...]:
    state, nodes = cluster.state(job.job)
    attempts = _attempts(root, job)
    progress = _progress(Path(job.folder), running=state == "RUNNING") if newest else ("-",) * 4
    return (
        job.job,
        job.name,
        state,
        nodes or (read_json(attempts[-1].start_file)["nodes"] if attempts else "-"),
        str(attempts[-1].number) if attempts else "-",
        *progress,
        _last_error(root, job),
    )


def _attempts(root: Path, job: Submitted) -> list[Attempt]:
    """The attempts of a job, oldest first."""
    paths = logs(root).glob(f"{job.job}_started-*.json")
    return [Attempt(logs(root), job.job, number) for number in sorted(int(path.stem.split("-")[-1]) for path in paths)]


def _first_end(root: Path, job: Submitted) -> dict[str, Any]:
    """The record of the first process that ended in the newest attempt; empty if there is none."""
    attempts = _attempts(root, job)
    return read_json(attempts[-1].end_file) or {} if attempts else {}


def _output(root: Path, job: Submitted) -> list[str]:
    """The last lines that the script, srun and rank 0 wrote to stderr."""
    path = logs(root) / f"{job.job}_0_log.err"
    return _tail(path).decode(errors="replace").splitlines() if path.is_file() else []


def _output_with(root: Path, job: Submitted, *prefixes: str) -> list[str]:
    return [line for line in _output(root, job) if line.startswith(prefixes)]


def _last_error(root: Path, job: Submitted) -> str:
    """The watchdog's message, else the first exception; srun's message if a process was killed."""
    if aborted := _output_with(root, job, ABORTED):
        return aborted[-1].removeprefix(ABORTED)
    srun_error = next(iter(_output_with(root, job, "srun: error")), "-")
    error = _first_end(root, job).get("error")
    return srun_error if error is None or srun_error.endswith("Killed") else error.strip().rpartition("\n")[2]


def _failure(root: Path, job: Submitted) -> str:
    if cluster.state(job.job)[0] not in ("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL"):
        return ""
    first = _first_end(root, job)
    if "error" in first:
        lines = [
            *_output_with(root, job, ABORTED, "srun: error", "slurmstepd")[:3],
            f"rank {first['rank']} on {first['host']} failed first:",
            *first["error"].strip().split("\n")[-10:],
        ]
    else:
        lines = _output(root, job)[-10:] or [f"no output in {logs(root)}: can its nodes write to that folder?"]
    return "\n".join([f"\n{job.job} {job.name}:", *(f"  {line}" for line in lines)])


def _progress(folder: Path, *, running: bool) -> tuple[str, str, str, str]:
    """(step, loss, clips per second, time left at this speed) from the last line of `log.jsonl`."""
    line = _last_line(folder / "log.jsonl")
    if line is None:
        return "-", "-", "-", "-"
    left = "-"
    if running and "step_seconds" in line:
        minutes = round((line["last_step"] - line["step"]) * line["step_seconds"] / 60)
        left = f"{minutes // 60}:{minutes % 60:02d} h"
    loss, speed = (
        f"{line[name]:.{digits}f}" if line.get(name) is not None else "-"
        for name, digits in (("loss", 4), ("clips_per_second", 1))
    )
    return f"{line['step']}/{line['last_step']}", loss, speed, left


def _last_line(path: Path) -> dict[str, Any] | None:
    """The last complete line, without reading the whole file."""
    if not path.is_file():
        return None
    complete = _tail(path).split(b"\n")[:-1]
    return json.loads(complete[-1]) if complete else None


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return file.read()
