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
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError, UserError, shipped
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
        temporary: Folders in `folder` that are removed when it is done, e.g. extracted features.
        source: Keys of the user's file that the options of the program come from, for messages.
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
    temporary: tuple[str, ...] = ()
    source: str = ""

    def shell(self, threads: int) -> str:
        """Return the command as a line for the shell."""
        return f"OMP_NUM_THREADS={threads} {shipped.python_path()}python -m {shlex.join(self.command)}"


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
        keep_going: When a job has failed, still run all jobs that do not depend on it.
        failed: Name -> why, of the jobs that the last `run` could not do: failed, or left out as one they need did.
    """

    processes: int = 2
    threads: int = 1
    preload: tuple[str, ...] = ()
    grace_seconds: float = 60.0
    keep_going: bool = False
    failed: dict[str, str] = field(default_factory=dict)
    _running: list[_Running] = field(default_factory=list, repr=False)

    def run(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Run the jobs that are not done yet, in their order as soon as their dependencies are done.

        Ctrl-C, SIGTERM and, without `keep_going`, a failing job end the other children, which may save their state
        first.

        Returns:
            Seconds that each stage took, summed over its finished jobs.

        Raises:
            JobFailed: A child failed; with `keep_going` see `failed` instead.
            ConfigError: The folder of a job with `keep` holds results of other settings.
        """
        self.failed = {}
        done = finished(jobs)
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
                    for message in self._collect(done):
                        bar.write(message, file=sys.stderr)
                    self._leave_out_dependent(waiting)
                    now, bar.total = self._progress([job for job in jobs if job.name not in self.failed], done)
                    running = ", ".join(running.job.name for running in self._running)
                    failed = f", {len(self.failed)} failed or left out" if self.failed else ""
                    bar.set_postfix_str(f"{len(done)}/{len(jobs)} done{failed}; running: {running}", refresh=False)
                    bar.update(max(0, now - bar.n))
            finally:
                self._end_children()
                signal.signal(signal.SIGTERM, previous)
        stages = dict.fromkeys(job.stage for job in jobs)
        return {stage: sum(done.get(job.name, 0.0) for job in jobs if job.stage == stage) for stage in stages}

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

    def _collect(self, done: dict[str, float]) -> list[str]:
        """Move ended jobs from `_running` to `done` or `failed`. Returns what failed."""
        ended = [running for running in self._running if running.program.exitcode is not None]
        self._running = [running for running in self._running if running not in ended]
        messages = []
        for running in ended:
            job, exitcode, now = running.job, running.program.exitcode, time.time()
            if exitcode:
                message = _explain(job, exitcode, self.threads)
                if not self.keep_going:
                    raise JobFailed(message)
                self.failed[job.name] = message
                messages.append(message)
                continue
            for name in job.temporary:
                shutil.rmtree(job.folder / name, ignore_errors=True)
            done[job.name] = round(now - running.started, 2)
            marker = {"command": list(job.command), "settings": job.settings, "seconds": done[job.name]}
            write_json(job.folder / DONE, {**marker, "began": running.started, "finished": now})
        return messages

    def _leave_out_dependent(self, waiting: list[Job]) -> None:
        """Move the jobs that need a failed one from `waiting` to `failed`."""
        while dependent := [job for job in waiting if any(name in self.failed for name in job.after)]:
            for job in dependent:
                waiting.remove(job)
                needed = next(name for name in job.after if name in self.failed)
                self.failed[job.name] = f"{job.name} was left out, as {needed} failed"

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
        scales = _scales(jobs, done)
        spent = total = 0.0
        for job in jobs:
            seconds = done.get(job.name, elapsed.get(job.name, 0.0))
            spent += job.slots * seconds
            estimate = job.seconds * scales.get(job.stage, scales[""])
            total += job.slots * (seconds if job.name in done else max(seconds, estimate))
        return int(spent / self.processes), int(total / self.processes) + 1


def _scales(jobs: Sequence[Job], done: dict[str, float]) -> dict[str, float]:
    """Return the ratio of measured to estimated time of the finished jobs, by stage and, under "", of all of them."""
    measured: dict[str, float] = {}
    estimated: dict[str, float] = {}
    for job in jobs:
        if job.name in done:
            for stage in (job.stage, ""):
                measured[stage] = measured.get(stage, 0.0) + done[job.name]
                estimated[stage] = estimated.get(stage, 0.0) + job.seconds
    return {"": 1.0, **{stage: measured[stage] / seconds for stage, seconds in estimated.items() if seconds}}


def finished(jobs: Sequence[Job]) -> dict[str, float]:
    """Return the names of the jobs whose results are up to date, and how long each took."""
    by_name = {job.name: job for job in jobs}
    markers: dict[str, dict[str, Any] | None] = {}

    def up_to_date(job: Job) -> dict[str, Any] | None:
        """Return the job's marker; None where it, or a job that it needs, has to run (again)."""
        if job.name not in markers:
            marker = read_json(job.folder / DONE)
            if marker is not None:
                needed = [up_to_date(by_name[name]) for name in job.after]
                current = marker["settings"] == _as_json(job.settings)
                if not current or any(other is None or other["finished"] > marker["began"] for other in needed):
                    marker = None
            markers[job.name] = marker
        return markers[job.name]

    return {job.name: marker["seconds"] for job in jobs if (marker := up_to_date(job)) is not None}


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
