"""Alternating timing of two implementations, and the table of results."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tubelet.runtime.text import text_table


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: What was measured.
        ours: Result of Tubelet, with its unit.
        peer: Result of the other implementation, with its unit.
        ratio: Speed of Tubelet divided by that of the peer; None without a peer.
        goal: Required ratio; None if there is no requirement.
    """

    name: str
    ours: str
    peer: str = "-"
    ratio: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats: seconds of both sides, and the peer's time divided by ours (the speedup)."""

    ours: float
    peer: float
    ratio: float


def seconds(function: Callable[[], object]) -> float:
    """Return the wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def time_alternately(
    ours: Callable[[], object],
    peer: Callable[[], object],
    repeats: int,
    clock: Callable[[Callable[[], object]], float] = seconds,
) -> Timing:
    """Time two functions alternately, after one untimed call of each.

    The ratio is computed within each repeat, so that other load on the machine affects both sides equally. The order
    alternates.

    Args:
        ours: Function of Tubelet.
        peer: Function of the other implementation.
        repeats: Number of timed calls of each function.
        clock: Calls a function and returns the seconds to count.
    """
    ours()
    peer()
    timings = []
    for repeat in range(repeats):
        if repeat % 2:
            peer_seconds, our_seconds = clock(peer), clock(ours)
        else:
            our_seconds, peer_seconds = clock(ours), clock(peer)
        timings.append((our_seconds, peer_seconds, peer_seconds / our_seconds))
    return Timing(*(statistics.median(column) for column in zip(*timings, strict=True)))


def table(rows: Sequence[Row]) -> str:
    """Format rows as text; the ratio is the speed of Tubelet divided by that of the peer."""
    lines = [("", "ours", "peer", "ours / peer", "goal")]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
        goal = "-" if row.goal is None else f"{row.goal:g}x {'reached' if (row.ratio or 0) >= row.goal else 'MISSED'}"
        lines.append((row.name, row.ours, row.peer, ratio, goal))
    return text_table(lines)
