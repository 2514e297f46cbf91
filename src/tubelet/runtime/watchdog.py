"""Nobody waits for ever for a process that has died or hangs: the whole job ends, and says which one it was."""

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

from tubelet.runtime.distributed import World

HEARTBEAT_SECONDS = 5.0
"""Seconds between two signs of life."""
MISSED = 3
"""So many signs of life may be missing before a process counts as dead."""
FINISHED = "finished"
VERDICT = "error: the job ends, as "
"""How the line begins that says which process it was, and what happened to it."""
WAITS_FOR_OTHERS = ("torch/distributed/", "torch/autograd/")
"""Where in torch the main thread stands while it waits for a collective, or for one in a backward pass."""
_UNSEEN = {"host": "an unknown host", "beat": 0, "doing": "starting", "at": "", "failed": None}


@dataclass
class _Member:
    """What the main process knows of a process: its last sign of life, and when it, its note and its failure came."""

    sign: dict[str, Any]
    at: float
    doing_since: float
    failed_since: float | None = None

    def see(self, sign: dict[str, Any], now: float) -> None:
        if sign["beat"] != self.sign["beat"]:
            self.at = now
        if sign["doing"] != self.sign["doing"]:
            self.doing_since = now
        if sign["failed"] and self.failed_since is None:
            self.failed_since = now
        self.sign = sign

    def waits_for_others(self) -> bool:
        return any(folder in self.sign["at"] for folder in WAITS_FOR_OTHERS)


class Watchdog:
    """In `with Watchdog(world, timeout) as watchdog:` every process calls `watchdog.note("what it does now")`.

    Each tells the main one every few seconds that it lives and what it noted last. When one is silent, fails, or notes
    nothing new for `timeout` seconds, all processes print its rank, host, last note and place in the code, and end with
    status 1.
    In a single process it does nothing.
    """

    def __init__(self, world: World, timeout: float):
        self.world, self.timeout = world, timeout
        self.interval = min(HEARTBEAT_SECONDS, timeout / (2 * MISSED))
        self._sign: dict[str, Any] = {**_UNSEEN, "host": socket.gethostname()}
        self._members: dict[int, _Member] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def note(self, doing: str) -> None:
        self._sign["doing"] = doing

    def __enter__(self) -> "Watchdog":
        if self.world.world_size > 1:
            self._store = self._open_store()
            self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not self._thread.is_alive():
            return
        if isinstance(error, Exception):
            # Told as Python would do it in the end, which this process may not come to.
            sys.excepthook(type(error), error, error.__traceback__)
            # The others cannot go on without this one, or it fails because another has died: the verdict tells which.
            raised = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{raised.filename}:{raised.lineno} in {raised.name}"
            self._sign["failed"] = [self._store.add("failures", 1), f"{type(error).__name__}: {error}", place]
            self._thread.join()
        self._sign["doing"] = FINISHED
        self._stop.set()
        self._thread.join()

    def _open_store(self) -> dist.TCPStore:
        """A store of its own: the process group's may be busy with what has to be watched."""
        main = self.world.is_main
        store = dist.TCPStore("0.0.0.0", 0, self.world.world_size, True, wait_for_workers=False) if main else None
        host, port = self.world.broadcast_from_rank0(lambda: (socket.gethostname(), store.port))
        return store or dist.TCPStore(host, port, self.world.world_size, False)

    def _watch(self) -> None:
        """The thread: signs of life go out, and a verdict comes back. The main process's also judges."""
        over = False
        while True:
            self._sign |= {"beat": self._sign["beat"] + 1, "at": _place_of_main_thread()}
            try:
                self._store.set(f"sign/{self.world.rank}", json.dumps(self._sign))
                if self.world.is_main and not over and (verdict := self._judge()):
                    self._store.set("verdict", verdict)
                if self._store.check(["verdict"]):
                    self._end(self._store.get("verdict").decode())
            except RuntimeError as error:
                if not over:
                    self._end(f"rank 0, the main process, is gone ({str(error).splitlines()[0]})")
            if over:
                return
            over = self._stop.wait(self.interval)

    def _judge(self) -> str | None:
        """What has happened to whom, if anything."""
        now, silence = time.monotonic(), MISSED * self.interval
        for rank in range(self.world.world_size):
            key = f"sign/{rank}"
            sign = json.loads(self._store.get(key)) if self._store.check([key]) else _UNSEEN
            self._members.setdefault(rank, _Member(sign, now, now)).see(sign, now)
        running = {rank: m for rank, m in self._members.items() if m.sign["doing"] != FINISHED}
        for rank, member in running.items():
            if now - member.at > silence:
                return _verdict(rank, member, f"has died (no sign of life for {now - member.at:.0f} s)")
        # A failure may follow from another process's death, which shows only after some silence.
        failed = {rank: m for rank, m in running.items() if m.failed_since and now - m.failed_since > silence}
        if failed:
            rank = min(failed, key=lambda rank: failed[rank].sign["failed"])
            return _verdict(rank, failed[rank], f"failed ({failed[rank].sign['failed'][1]})")
        # The others wait for the one that hangs, and have begun to after it noted its last.
        rank = min(running, key=lambda rank: (running[rank].waits_for_others(), running[rank].doing_since))
        if (idle := now - running[rank].doing_since) > self.timeout:
            return _verdict(rank, running[rank], f"hangs (nothing new for {idle:.0f} s)")
        return None

    def _end(self, verdict: str) -> None:
        print(f"{VERDICT}{verdict}", file=sys.stderr, flush=True)
        if self.world.is_main:
            time.sleep(2 * self.interval)  # the store lives here; the others want to read the verdict
        os._exit(1)


def _verdict(rank: int, member: _Member, what: str) -> str:
    sign = member.sign
    place = sign["failed"][2] if sign["failed"] else sign["at"]
    return f"rank {rank} on {sign['host']} {what}; the last it noted: {sign['doing']}, at {place}"


def _place_of_main_thread() -> str:
    frame = sys._current_frames().get(threading.main_thread().ident)
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}" if frame else ""
