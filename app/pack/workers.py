"""Write shards in child processes, so that a video that crashes or blocks its decoder costs only itself."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait

from app.pack.options import Options
from app.pack.shard import ShardWriter
from tubelet.runtime.parent import leave_signals_to

Videos = Sequence[tuple[str, int]]

POLL_SECONDS = 0.5


class PackError(Exception):
    """A child process has failed for another reason than a video, such as a full disk."""


class _Child:
    def __init__(self, options: Options, number: int, videos: Videos, unreadable: dict[int, str]):
        self.number, self.videos, self.unreadable = number, videos, unreadable
        self.index: int | None = None
        self.since = time.monotonic()
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe(duplex=False)
        arguments = (os.getpid(), options, number, videos, unreadable, theirs)
        self.process = context.Process(target=_write, args=arguments, daemon=True)
        self.process.start()
        theirs.close()


def write_shards(
    options: Options, videos_of: Callable[[int], Videos], shards: list[int], done: Callable[[int], object]
) -> None:
    """Write shards, each in a process of its own.

    Args:
        videos_of: Returns the paths and labels of a shard.
        shards: Their numbers.
        done: Called with the number of videos done since the last call.

    Raises:
        PackError: A shard cannot be written.
    """
    waiting, running = [(number, dict[int, str]()) for number in shards], list[_Child]()
    try:
        while waiting or running:
            while waiting and len(running) < options.num_processes:
                number, unreadable = waiting.pop(0)
                running.append(_Child(options, number, videos_of(number), unreadable))
            wait([child.connection for child in running], POLL_SECONDS)
            for child in list(running):
                problem = _update(child, options.timeout, done)
                if problem is None:
                    continue
                running.remove(child)
                if problem:  # begin the shard again, without this video
                    assert child.index is not None
                    done(-child.index)
                    waiting.insert(0, (child.number, child.unreadable | {child.index: problem}))
    finally:
        for child in running:
            child.process.kill()


def _update(child: _Child, timeout: float, done: Callable[[int], object]) -> str | None:
    """Read the messages of a child. Returns None while it runs, "" when it is done, or why its video failed."""
    try:
        while child.connection.poll():
            message = child.connection.recv()
            if isinstance(message, str):
                raise PackError(message)
            done(message - (child.index or 0))
            child.index, child.since = message, time.monotonic()
    except EOFError:
        child.process.join()
        if child.process.exitcode == 0:
            return ""
        if child.index is None or child.index >= len(child.videos):
            raise PackError(f"the process of shard {child.number} ended with {child.process.exitcode}") from None
        return f"it ended its process with exit status {child.process.exitcode}"
    if time.monotonic() - child.since > timeout:
        child.process.kill()
        child.process.join()
        return f"it took more than {timeout:g} s (timeout)"
    return None


def _write(
    parent: int, options: Options, number: int, videos: Videos, unreadable: dict[int, str], connection: Connection
) -> None:
    leave_signals_to(parent)
    try:
        # Sending also ends this process once its parent is gone, where the kernel does not.
        ShardWriter(options, number).write(videos, unreadable, connection.send)
        connection.send(len(videos))
    except BrokenPipeError:
        raise SystemExit(1) from None
    except Exception as error:
        connection.send(f"shard {number}: {type(error).__name__}: {error}")
