"""Programs run as child processes, some at a time: with dependencies, logs, a progress bar, and no work done twice.

A finished job leaves `done.json` in its folder: what it was started with, and how long it took. It is skipped from then
on, unless its settings have changed or something that it was made from has been made anew.
"""

import argparse
import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tubelet import config
from tubelet.config import ConfigError, Schema, UserError
from tubelet.runtime.progress import progress

DONE = "done.json"
LOG = "output.log"

_CHILDREN = multiprocessing.get_context("fork")


class JobFailed(UserError):
    """A child ended with an error. The message holds its last lines and the command to run it alone."""


def main(program: str, description: str, schema: type[Schema], run: Callable[[Schema], None]) -> None:
    """`python -m <program> --fname FILE [key.path=value ...]` of a program that runs jobs: `run` with its options."""
    usage = "%(prog)s --fname FILE [key.path=value ...]"
    parser = argparse.ArgumentParser(prog=f"python -m {program}", usage=usage, description=description)
    parser.add_argument("--fname", required=True, help="the YAML file of what is to be run")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the file")
    arguments = parser.parse_args()
    try:
        run(config.load(arguments.fname, arguments.overrides, schema))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


@dataclass(frozen=True)
class Job:
    """A program to run: `python -m <command>` in the current folder."""

    name: str
    stage: str
    command: tuple[str, ...]
    folder: Path
    settings: dict[str, Any]
    """All that the result depends on, but other jobs."""
    seconds: float
    """A guess of how long it takes; measured times of the same stage replace it."""
    after: tuple[str, ...] = ()
    """Names of the jobs whose results it needs."""
    keep: bool = False
    """Results that other settings have made are an error here, instead of being removed and made again."""
    slots: int = 1
    """How many processes it runs itself; they count as so many of the pool's."""

    def shell(self, threads: int) -> str:
        """The command as one would type it."""
        return f"OMP_NUM_THREADS={threads} python -m {shlex.join(self.command)}"


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    began: float
    elapsed: float = 0.0


@dataclass
class Pool:
    """Runs jobs, `processes` at a time with `threads` threads each.

    Jobs are forks of this process, which imports the modules `preload` first: torch alone takes seconds, each time.
    """

    processes: int = 2
    threads: int = 1
    preload: tuple[str, ...] = ()
    grace_seconds: float = 60.0
    """How long a child that is told to end may take, e.g. to save a checkpoint, before it is killed."""
    _running: list[_Running] = field(default_factory=list, repr=False)

    def run(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Run what is not done yet and return the seconds that each stage took, summed over its jobs.

        Jobs start in their order as soon as what they need is done. Raises JobFailed when a child fails; it, Ctrl-C and
        SIGTERM end the other children, which may save what they have.
        """
        done = {job.name: seconds for job in jobs if (seconds := _seconds_if_done(job, jobs)) is not None}
        for job in jobs:
            if job.name not in done:
                _clear(job)
        waiting = [job for job in jobs if job.name not in done]
        if waiting:
            os.environ["OMP_NUM_THREADS"] = str(self.threads)  # libraries look at it when they are loaded
            for module in self.preload:
                importlib.import_module(module)
        clock = _Clock(jobs, done, self.processes)
        with _sigterm_as_ctrl_c(), progress(desc="study", total=clock.total, initial=clock.passed, unit="s") as bar:
            try:
                while waiting or self._running:
                    self._start_ready(waiting, done)
                    clock.show(bar, self._running)
                    time.sleep(0.2)
                    for finished in self._collect():
                        done[finished.job.name] = finished.elapsed
                clock.show(bar, self._running)
            finally:
                self._end_children()
        return clock.seconds_by_stage()

    def _start_ready(self, waiting: list[Job], done: dict[str, float]) -> None:
        for job in list(waiting):
            free = self.processes - sum(running.job.slots for running in self._running)
            if all(name in done for name in job.after) and (job.slots <= free or not self._running):
                waiting.remove(job)
                self._running.append(_Running(job, self._start(job), time.time()))

    def _start(self, job: Job) -> BaseProcess:
        job.folder.mkdir(parents=True, exist_ok=True)
        with open(job.folder / LOG, "ab") as log:
            # The lock belongs to the open file, which the child keeps: it lasts as long as the child or its children.
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise JobFailed(f"{job.name}: an earlier start of it is still running; it holds {log.name}") from None
            log.write(f"\n$ {job.shell(self.threads)}\n".encode())
            log.flush()
            process = _CHILDREN.Process(target=_run, args=(job.command, log.fileno(), self.threads))
            process.start()
        return process

    def _collect(self) -> list[_Running]:
        for running in self._running:
            running.elapsed = time.time() - running.began
        finished = [running for running in self._running if running.process.exitcode is not None]
        self._running = [running for running in self._running if running not in finished]
        for running in finished:
            if running.process.exitcode != 0:
                raise JobFailed(_explain(running, self.threads))
            _mark_done(running)
        return finished

    def _end_children(self) -> None:
        for running in self._running:
            _signal_group(running.process, signal.SIGTERM)
        until = time.monotonic() + self.grace_seconds
        for running in self._running:
            running.process.join(max(0.0, until - time.monotonic()))
            if running.process.exitcode is None:
                _signal_group(running.process, signal.SIGKILL)
                running.process.join()
        self._running = []


class _Clock:
    """How much is done and left, in seconds of the wall: of the processes' time divided by their number."""

    def __init__(self, jobs: Sequence[Job], done: dict[str, float], processes: int):
        self.jobs, self.done, self.processes = jobs, done, processes
        self.passed = int(self._spent({}) / processes)
        self.total = max(self.passed, self._total({}))

    def show(self, bar: Any, running: list[_Running]) -> None:
        elapsed = {r.job.name: time.time() - r.began for r in running}
        self.total = self._total(elapsed)
        bar.total = self.total
        stages = dict.fromkeys(r.job.stage for r in running)
        bar.set_postfix_str("; ".join(self._stage(stage, elapsed) for stage in stages), refresh=False)
        passed = int(self._spent(elapsed) / self.processes)
        bar.update(max(0, passed - bar.n))

    def seconds_by_stage(self) -> dict[str, float]:
        stages: dict[str, float] = {}
        for job in self.jobs:
            stages[job.stage] = stages.get(job.stage, 0.0) + self.done[job.name]
        return stages

    def _stage(self, stage: str, elapsed: dict[str, float]) -> str:
        """E.g. `pretrain 1/3, 4:10 left`."""
        jobs = [job for job in self.jobs if job.stage == stage]
        finished = sum(job.name in self.done for job in jobs)
        left = sum(
            self._estimate(job, elapsed) - elapsed.get(job.name, 0.0) for job in jobs if job.name not in self.done
        )
        minutes, seconds = divmod(int(left / min(self.processes, max(1, len(jobs) - finished))), 60)
        return f"{stage} {finished}/{len(jobs)}, {minutes}:{seconds:02d} left"

    def _total(self, elapsed: dict[str, float]) -> int:
        left = sum(job.slots * self._estimate(job, elapsed) for job in self.jobs if job.name not in self.done)
        return int((left + self._spent({})) / self.processes) + 1

    def _spent(self, elapsed: dict[str, float]) -> float:
        """Seconds of all processes so far."""
        return sum(job.slots * (self.done | elapsed).get(job.name, 0.0) for job in self.jobs)

    def _estimate(self, job: Job, elapsed: dict[str, float]) -> float:
        """The guess, corrected by how the guesses of finished jobs of the stage (or else of all) turned out."""
        finished = [other for other in self.jobs if other.name in self.done]
        alike = [other for other in finished if other.stage == job.stage] or finished
        guessed = sum(other.seconds for other in alike)
        correction = sum(self.done[other.name] for other in alike) / guessed if guessed else 1.0
        return max(job.seconds * correction, elapsed.get(job.name, 0.0))


def _seconds_if_done(job: Job, jobs: Sequence[Job]) -> float | None:
    """How long the job took if its results stand, else None."""
    marker = _read_marker(job)
    if marker is None or marker["settings"] != _plain(job.settings):
        return None
    by_name = {other.name: other for other in jobs}
    for needed in (by_name[name] for name in job.after):
        if _seconds_if_done(needed, jobs) is None or _read_marker(needed)["finished"] > marker["began"]:
            return None
    return marker["seconds"]


def _clear(job: Job) -> None:
    """Remove results that no longer stand; those of an unfinished run stay, for the program to go on with."""
    marker = _read_marker(job)
    if marker is None:
        return
    if job.keep and marker["settings"] != _plain(job.settings):
        changed = ", ".join(_differences(marker["settings"], _plain(job.settings)))
        raise ConfigError(
            f"{job.folder} holds results of other settings ({changed}). Choose another folder=..., or remove that one"
        )
    if job.keep:
        (job.folder / DONE).unlink()
    else:
        shutil.rmtree(job.folder)


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield f"{key}: {old!r} there, {new!r} here"


def _read_marker(job: Job) -> dict[str, Any] | None:
    path = job.folder / DONE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _mark_done(running: _Running) -> None:
    marker = {
        "command": list(running.job.command),
        "settings": running.job.settings,
        "began": running.began,
        "finished": time.time(),
        "seconds": round(running.elapsed, 2),
    }
    aside = running.job.folder / f"{DONE}.tmp"
    aside.write_text(json.dumps(marker, indent=1), encoding="utf-8")
    os.replace(aside, running.job.folder / DONE)


def _plain(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))


def _explain(running: _Running, threads: int) -> str:
    path = running.job.folder / LOG
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().split("\n")
    code = running.process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    last = "\n".join(f"    {line}" for line in lines[-15:])
    return (
        f"{running.job.name} {how}; the last lines of {path}:\n{last}\nRun it alone:\n    {running.job.shell(threads)}"
    )


def _run(command: tuple[str, ...], log: int, threads: int) -> None:
    """What a child does: `python -m <command>`, with its output in the open file `log`."""
    os.setsid()  # a session of its own: Ctrl-C reaches the study alone, which then ends its children in order
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for descriptor, source in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
        os.dup2(source, descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.environ |= {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)  # it has read the environment already
    sys.path.insert(0, os.getcwd())
    sys.argv = list(command)
    sys.modules.pop(command[0], None)  # the one that this process may have imported is no program that runs
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def _signal_group(process: BaseProcess, number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it has ended, or is no group yet
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    def interrupt(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
