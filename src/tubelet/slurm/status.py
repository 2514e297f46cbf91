"""The jobs of a folder: how they stand, and how to end them."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError
from tubelet.runtime.watchdog import VERDICT
from tubelet.slurm import cluster
from tubelet.slurm.attempts import Attempt
from tubelet.slurm.submit import Submitted, logs, read_jobs

COLUMNS = ("job", "name", "state", "nodes", "restarts", "step", "loss", "clips/s", "left", "last error")


def table(root: Path) -> str:
    """One line a job; below it, for each job that failed, what is known of it and the end of the first error."""
    jobs = _jobs(root)
    rows = [COLUMNS, *(_row(root, job) for job in jobs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), *filter(None, (_failure(root, job) for job in jobs))])


def cancel(root: Path) -> str:
    """Cancel the folder's jobs that are still in the queue, and nothing else; says which."""
    queued = [job.job for job in _jobs(root) if is_queued(root, job)]
    if queued:
        subprocess.run(["scancel", *queued], check=True)
    return f"cancelled: {' '.join(queued)}" if queued else "no job of this folder is in the queue"


def _jobs(root: Path) -> list[Submitted]:
    jobs = read_jobs(root)
    if not jobs:
        raise ConfigError(f"{root}: no jobs.json in there; give the folder that the jobs were submitted with")
    cluster.check_installed()
    return jobs


def is_queued(root: Path, job: Submitted) -> bool:
    """Numbers of jobs can be given anew when a cluster is set up again; the file that a job prints to cannot."""
    live = cluster.show(job.job)
    return bool(live) and live["JobState"] in cluster.IN_QUEUE and Path(live["StdOut"]).parent == logs(root)


def _row(root: Path, job: Submitted) -> tuple[str, ...]:
    state, nodes = cluster.state(job.job)
    starts = _starts(root, job)
    step, loss, speed, left = _progress(Path(job.folder), running=state == "RUNNING")
    return (
        job.job,
        job.name,
        state,
        nodes or (json.loads(starts[-1].started.read_text(encoding="utf-8"))["nodes"] if starts else "-"),
        str(starts[-1].number) if starts else "-",
        step,
        loss,
        speed,
        left,
        _last_error(root, job),
    )


def _starts(root: Path, job: Submitted) -> list[Attempt]:
    """Of a job, first to last."""
    paths = logs(root).glob(f"{job.job}_started-*.json")
    return [Attempt(logs(root), job.job, number) for number in sorted(int(path.stem.split("-")[-1]) for path in paths)]


def _first_end(starts: list[Attempt]) -> dict[str, Any]:
    """What the first process that left said in the newest start; empty when none has."""
    if not starts or not starts[-1].ended.is_file():
        return {}
    return json.loads(starts[-1].ended.read_text(encoding="utf-8"))


def _output(root: Path, job: Submitted) -> list[str]:
    """The last lines of stderr of the script, srun and rank 0."""
    path = logs(root) / f"{job.job}_0_log.err"
    return _tail(path).decode(errors="replace").splitlines() if path.is_file() else []


def _said(root: Path, job: Submitted, *beginnings: str) -> list[str]:
    return [line for line in _output(root, job) if line.startswith(beginnings)]


def _last_error(root: Path, job: Submitted) -> str:
    """What the watchdog found; else the first error, but for a process that was killed before it could say one."""
    if verdict := _said(root, job, VERDICT):
        return verdict[-1].removeprefix(VERDICT)
    seen = next(iter(_said(root, job, "srun: error")), "-")
    error = _first_end(_starts(root, job)).get("error")
    return seen if error is None or seen.endswith("Killed") else error.strip().rpartition("\n")[2]


def _failure(root: Path, job: Submitted) -> str:
    if cluster.state(job.job)[0] not in ("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL"):
        return ""
    first = _first_end(_starts(root, job))
    if "error" in first:
        seen = _said(root, job, VERDICT, "srun: error", "slurmstepd")[:3]
        lines = [
            *seen,
            f"rank {first['rank']} on {first['host']} failed first:",
            *first["error"].strip().split("\n")[-10:],
        ]
    else:
        lines = _output(root, job)[-10:] or [f"no output in {logs(root)}: do its nodes see that folder?"]
    return "\n".join([f"\n{job.job} {job.name}:", *(f"  {line}" for line in lines)])


def _progress(folder: Path, *, running: bool) -> tuple[str, str, str, str]:
    """(step, loss, clips a second, time left at this speed) from the end of `log.jsonl`."""
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
    """The last whole line, without reading the file from its beginning."""
    if not path.is_file():
        return None
    whole = _tail(path).split(b"\n")[:-1]
    return json.loads(whole[-1]) if whole else None


def _tail(path: Path) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        return file.read()
