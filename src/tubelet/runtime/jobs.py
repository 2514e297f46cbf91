"""Run programs as child processes: several at a time, with dependencies, logs, progress and resume.

A finished job leaves `done.json` in its folder, with its settings and its duration. It is skipped from then on, unless
its settings have changed or a job that it depends on has run again. Job libraries (submitit's LocalExecutor, doit)
start a new interpreter for each job, which takes seconds to import torch; here jobs are forks of a process that has
imported it already.
"""

import importlib
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError, UserError
from tubelet.runtime.files import read_json, write_json
from tubelet.runtime.fork import AlreadyRunning, ForkedProgram
from tubelet.runtime.progress import progress

DONE = "done.json"
LOG = "output.log"


class JobFailed(UserError):
    """A child process failed. The message has the last lines of its log and the command to run it alone."""


@dataclass(frozen=True)
class Job:
    """A program, run as `python -m <command>` in the current folder, that writes to `folder`.

    Attributes:
        settings: Everything that the result depends on, except other jobs.
        seconds: Estimated duration; corrected by the measured durations of other jobs of the same stage.
        after: Names of the jobs whose results it needs.
        keep: Whether results of other settings are an error, instead of being deleted and computed again.
        slots: Number of processes that it starts itself; it takes as many of the pool's.
    """

    name: str
    stage: str
    command: tuple[str, ...]
    folder: Path
    settings: dict[str, Any]
    seconds: float
    after: tuple[str, ...] = ()
    keep: bool = False
    slots: int = 1

    def shell(self, threads: int) -> str:
        """Return the command as a line for the shell."""
        return f"OMP_NUM_THREADS={threads} python -m {shlex.join(self.command)}"


@dataclass
class _Running:
    job: Job
    program: ForkedProgram
    started: float = field(default_factory=time.time)


@dataclass
class Pool:
    """Runs jobs, up to `processes` at a time with `threads` threads each.

    Attributes:
        preload: Modules that are imported once, before the jobs are forked.
        grace_seconds: Time that children have after SIGTERM, e.g. to save a checkpoint, before they are killed.
    """

    processes: int = 2
    threads: int = 1
    preload: tuple[str, ...] = ()
    grace_seconds: float = 60.0
    _running: list[_Running] = field(default_factory=list, repr=False)

    def run(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Run the jobs that are not done yet, in their order as soon as their dependencies are done.

        A failing job, Ctrl-C and SIGTERM end the other children, which may save their state first.

        Returns:
            Seconds that each stage took, summed over its jobs.

        Raises:
            JobFailed: A child failed.
            ConfigError: The folder of a job with `keep` holds results of other settings.
        """
        done = {job.name: seconds for job in jobs if (seconds := _seconds_if_done(job, jobs)) is not None}
        waiting = [job for job in jobs if job.name not in done]
        for job in waiting:
            _remove_outdated(job)
        if waiting:
            os.environ["OMP_NUM_THREADS"] = str(self.threads)  # libraries read it when they are imported
            for module in self.preload:
                importlib.import_module(module)
        initial, total = self._progress(jobs, done)
        previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
        with progress(desc="jobs", total=total, initial=initial, unit="s") as bar:
            try:
                while waiting or self._running:
                    self._start_ready(waiting, done)
                    time.sleep(0.2)
                    self._collect(done)
                    finished, bar.total = self._progress(jobs, done)
                    running = ", ".join(running.job.name for running in self._running)
                    bar.set_postfix_str(f"{len(done)}/{len(jobs)} done; running: {running}", refresh=False)
                    bar.update(max(0, finished - bar.n))
            finally:
                self._end_children()
                signal.signal(signal.SIGTERM, previous)
        stages = dict.fromkeys(job.stage for job in jobs)
        return {stage: sum(done[job.name] for job in jobs if job.stage == stage) for stage in stages}

    def _start_ready(self, waiting: list[Job], done: dict[str, float]) -> None:
        for job in list(waiting):
            free = self.processes - sum(running.job.slots for running in self._running)
            if all(name in done for name in job.after) and (job.slots <= free or not self._running):
                waiting.remove(job)
                self._running.append(_Running(job, self._start(job)))

    def _start(self, job: Job) -> ForkedProgram:
        log = job.folder / LOG
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            return ForkedProgram(job.command, log, self.threads, title=job.shell(self.threads))
        except AlreadyRunning:
            raise JobFailed(f"{job.name}: already running in another process, which has locked {log}") from None

    def _collect(self, done: dict[str, float]) -> None:
        """Move finished jobs from `_running` to `done`."""
        finished = [running for running in self._running if running.program.exitcode is not None]
        self._running = [running for running in self._running if running not in finished]
        for running in finished:
            job, exitcode, now = running.job, running.program.exitcode, time.time()
            if exitcode:
                raise JobFailed(_explain(job, exitcode, self.threads))
            done[job.name] = round(now - running.started, 2)
            marker = {"command": list(job.command), "settings": job.settings, "seconds": done[job.name]}
            write_json(job.folder / DONE, {**marker, "began": running.started, "finished": now})

    def _end_children(self) -> None:
        for running in self._running:
            running.program.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + self.grace_seconds
        for running in self._running:
            running.program.wait(max(0.0, deadline - time.monotonic()))
        self._running = []

    def _progress(self, jobs: Sequence[Job], done: dict[str, float]) -> tuple[int, int]:
        """Return finished and total seconds of wall-clock time: of all processes, divided by their number."""
        elapsed = {running.job.name: time.time() - running.started for running in self._running}
        finished = total = 0.0
        for job in jobs:
            seconds = (done | elapsed).get(job.name, 0.0)
            finished += job.slots * seconds
            total += job.slots * (seconds if job.name in done else max(seconds, _estimate(job, jobs, done)))
        return int(finished / self.processes), int(total / self.processes) + 1


def _estimate(job: Job, jobs: Sequence[Job], done: dict[str, float]) -> float:
    """Scale the estimate of a job by the ratio of measured to estimated time of finished jobs, of its stage if any."""
    finished = [other for other in jobs if other.name in done]
    similar = [other for other in finished if other.stage == job.stage] or finished
    estimated = sum(other.seconds for other in similar)
    return job.seconds * (sum(done[other.name] for other in similar) / estimated if estimated else 1.0)


def _seconds_if_done(job: Job, jobs: Sequence[Job]) -> float | None:
    """Return how long the job took if its results are up to date, else None."""
    marker = read_json(job.folder / DONE)
    if marker is None or marker["settings"] != _as_json(job.settings):
        return None
    by_name = {other.name: other for other in jobs}
    for dependency in (by_name[name] for name in job.after):
        seconds = _seconds_if_done(dependency, jobs)
        if seconds is None or read_json(dependency.folder / DONE)["finished"] > marker["began"]:
            return None
    return marker["seconds"]


def _remove_outdated(job: Job) -> None:
    """Remove results that are out of date. Those of an unfinished job stay: the program resumes from them."""
    marker = read_json(job.folder / DONE)
    if marker is None:
        return
    if not job.keep:
        shutil.rmtree(job.folder)
    elif changes := ", ".join(_differences(marker["settings"], _as_json(job.settings))):
        raise ConfigError(
            f"{job.folder} holds results of other settings ({changes}). Choose another folder=..., or remove that one"
        )
    else:
        (job.folder / DONE).unlink()


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield f"{key}: {old!r} before, {new!r} now"


def _as_json(value: Any) -> Any:
    """Return the value as it is read back from JSON: tuples become lists, keys strings."""
    return json.loads(json.dumps(value))


def _explain(job: Job, exitcode: int, threads: int) -> str:
    path = job.folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    how = f"was killed by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with exit status {exitcode}"
    last = "\n".join(f"    {line}" for line in lines[-15:])
    return f"{job.name} {how}; the last lines of {path}:\n{last}\nRun it alone:\n    {job.shell(threads)}"
