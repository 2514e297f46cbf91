"""Aborts the job when a rank dies, fails or hangs, with a message that names the rank."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tubelet.config import UserError
from tubelet.runtime.distributed import World

HEARTBEAT_SECONDS = 5.0
"""Seconds between two heartbeats."""
POLL_SECONDS = 1.0
"""Seconds between two looks whether the job was aborted."""
MISSED = 3
"""Number of missing heartbeats after which a rank counts as dead."""
FINISHED = "finished"
ABORTED = "error: job aborted: "
"""Prefix of the message that names the rank and the reason."""
COLLECTIVES = ("torch/distributed/", "torch/autograd/")
"""Folders of the code that the main thread executes while it waits for a collective, also one in a backward pass."""
_NO_HEARTBEAT = {"host": "an unknown host", "count": 0, "activity": "starting", "location": "", "failed": None}


@dataclass
class _RankStatus:
    """The last heartbeat of a rank, and when rank 0 saw it, its current activity and its failure first."""

    heartbeat: dict[str, Any]
    heartbeat_at: float
    activity_since: float
    failed_since: float | None = None

    def update(self, heartbeat: dict[str, Any], now: float) -> None:
        if heartbeat["count"] != self.heartbeat["count"]:
            self.heartbeat_at = now
        if heartbeat["activity"] != self.heartbeat["activity"]:
            self.activity_since = now
        if heartbeat["failed"] and self.failed_since is None:
            self.failed_since = now
        self.heartbeat = heartbeat

    def in_collective(self) -> bool:
        return any(folder in self.heartbeat["location"] for folder in COLLECTIVES)


class Watchdog:
    """Monitors all ranks from rank 0; does nothing in a single process.

    Each rank sends a heartbeat with its current activity to rank 0 every few seconds. When the heartbeats of a rank
    stop, it fails, or its activity does not change for `timeout` seconds, all ranks print its rank, host, last activity
    and location in the code, and exit with status 1.

    Example:
        >>> with Watchdog(world, timeout=600.0) as watchdog:
        ...     for step, batch in enumerate(loader):
        ...         watchdog.note(f"in step {step}")
        ...         train_step(batch)
    """

    def __init__(self, world: World, timeout: float):
        self.world, self.timeout = world, timeout
        self.interval = min(HEARTBEAT_SECONDS, timeout / (2 * MISSED))
        self._heartbeat: dict[str, Any] = {**_NO_HEARTBEAT, "host": socket.gethostname()}
        self._ranks: dict[int, _RankStatus] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def note(self, activity: str) -> None:
        """Set the current activity of this rank."""
        self._heartbeat["activity"] = activity

    def __enter__(self) -> "Watchdog":
        if self.world.world_size > 1:
            self._store = self._open_store()
            self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not self._thread.is_alive():
            return
        if isinstance(error, Exception):
            self._fail(error)
        self._heartbeat["activity"] = FINISHED
        self._stop.set()
        self._thread.join()

    def _fail(self, error: Exception) -> None:
        """Report the error of this rank and wait to be aborted with the others, which cannot continue."""
        raised = traceback.extract_tb(error.__traceback__)[-1]
        location = f"{raised.filename}:{raised.lineno} in {raised.name}"
        is_consequence = False  # of an error that another rank has reported before it ended
        with contextlib.suppress(RuntimeError):
            is_consequence = not isinstance(error, UserError) and self._store.check(["abort"])
        if "SUBMITIT_EXECUTOR" in os.environ or not (isinstance(error, UserError) or is_consequence):
            # Print the traceback now: the process may be aborted before Python does. SLURM jobs record it.
            sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, UserError):
            # What the user has to change is never the consequence of another rank's death: all end at once.
            with contextlib.suppress(RuntimeError):  # rank 0 has ended, and so will this process
                reason = str(error) if self.world.is_main else f"rank {self.world.rank}: {error}"
                self._store.set("abort", reason)
        else:
            # This rank may have failed because another has died.
            self._heartbeat["failed"] = [self._store.add("failures", 1), f"{type(error).__name__}: {error}", location]
        self._thread.join()

    def _open_store(self) -> dist.TCPStore:
        """A separate store, as the process group's may block in the collectives that are monitored."""
        main = self.world.is_main
        server = dist.TCPStore("0.0.0.0", 0, self.world.world_size, True, wait_for_workers=False) if main else None

        def address() -> tuple[str, int]:
            assert server is not None  # called on rank 0
            return socket.gethostname(), server.port

        host, port = self.world.broadcast_from_rank0(address)
        return server or dist.TCPStore(host, port, self.world.world_size, False)

    def _watch(self) -> None:
        """In a thread: send heartbeats, and abort when rank 0 has found a failure."""
        stopped = False
        while True:
            self._heartbeat |= {"count": self._heartbeat["count"] + 1, "location": _location_of_main_thread()}
            try:
                self._store.set(f"heartbeat/{self.world.rank}", json.dumps(self._heartbeat))
                if self.world.is_main and not stopped and (reason := self._find_failure()):
                    self._store.set("abort", reason)
                if self._store.check(["abort"]):
                    self._abort(self._store.get("abort").decode())
            except RuntimeError as error:
                if not stopped:
                    self._abort(f"no connection to rank 0 ({str(error).splitlines()[0]})")
            if stopped:
                return
            stopped = self._wait()

    def _wait(self) -> bool:
        """Wait until the next heartbeat is due, or the job is aborted. Returns whether this rank has finished."""
        until = time.monotonic() + self.interval
        while time.monotonic() < until:
            if self._stop.wait(min(POLL_SECONDS, self.interval)):
                return True
            with contextlib.suppress(RuntimeError):  # `_watch` meets it again
                if self._store.check(["abort"]):
                    return False
        return False

    def _find_failure(self) -> str | None:
        """The message for the rank that died, failed or hangs, if any."""
        now, silence = time.monotonic(), MISSED * self.interval
        for rank in range(self.world.world_size):
            key = f"heartbeat/{rank}"
            heartbeat = json.loads(self._store.get(key)) if self._store.check([key]) else _NO_HEARTBEAT
            self._ranks.setdefault(rank, _RankStatus(heartbeat, now, now)).update(heartbeat, now)
        running = {rank: status for rank, status in self._ranks.items() if status.heartbeat["activity"] != FINISHED}
        for rank, status in running.items():
            if now - status.heartbeat_at > silence:
                return _message(rank, status, f"died (no heartbeat for {now - status.heartbeat_at:.0f} s)")
        # A failure may be the consequence of another rank's death, which is detected only after `silence`.
        failed = {rank: s for rank, s in running.items() if s.failed_since and now - s.failed_since > silence}
        if failed:
            rank = min(failed, key=lambda rank: failed[rank].heartbeat["failed"])
            return _message(rank, failed[rank], f"failed ({failed[rank].heartbeat['failed'][1]})")
        if not running:
            return None
        # The other ranks wait for the one that hangs in a collective, and have changed their activity after it.
        rank = min(running, key=lambda rank: (running[rank].in_collective(), running[rank].activity_since))
        if (idle := now - running[rank].activity_since) > self.timeout:
            return _message(rank, running[rank], f"hangs (no progress for {idle:.0f} s)")
        return None

    def _abort(self, reason: str) -> None:
        print(f"{ABORTED}{reason}", file=sys.stderr, flush=True)
        with contextlib.suppress(RuntimeError):
            read = self._store.add("read", 1)
            until = time.monotonic() + 2 * self.interval
            # Rank 0 hosts the store, from which the others read the reason.
            while self.world.is_main and read < self.world.world_size and time.monotonic() < until:
                time.sleep(0.1)
                read = self._store.add("read", 0)
        os._exit(1)


def _message(rank: int, status: _RankStatus, failure: str) -> str:
    heartbeat = status.heartbeat
    location = heartbeat["failed"][2] if heartbeat["failed"] else heartbeat["location"]
    return f"rank {rank} on {heartbeat['host']} {failure}; last activity: {heartbeat['activity']}, at {location}"


def _location_of_main_thread() -> str:
    ident = threading.main_thread().ident
    assert ident is not None  # it has been started
    frame = sys._current_frames().get(ident)
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""
