"""Two ways to do the same, timed in turn; results as one table."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A line of the table.

    name: what was measured. ours, peer: what each took or reached, with its unit. ratio: our speed over the peer's,
    None where there is no peer. goal: the least ratio that is wanted.
    """

    name: str
    ours: str
    peer: str = "-"
    ratio: float | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Timing:
    """Medians over the turns: seconds of either side, and the peer's time over ours (our speed over the peer's)."""

    ours: float
    peer: float
    ratio: float


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(
    ours: Callable[[], object],
    peer: Callable[[], object],
    repeats: int,
    clock: Callable[[Callable[[], object]], float] = seconds,
) -> Timing:
    """Time `ours` and `peer` alternately, `repeats` times each after one untimed call.

    The ratio is formed within each turn, so that whatever else the machine does hits both sides alike; who begins
    alternates. `clock` calls a side and tells the seconds that count.
    """
    ours()
    peer()
    turns = []
    for turn in range(repeats):
        if turn % 2:
            peer_seconds, our_seconds = clock(peer), clock(ours)
        else:
            our_seconds, peer_seconds = clock(ours), clock(peer)
        turns.append((our_seconds, peer_seconds, peer_seconds / our_seconds))
    return Timing(*(statistics.median(column) for column in zip(*turns, strict=True)))


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text; the ratio is our speed over the peer's."""
    lines = [("", "ours", "peer", "ours / peer", "goal")]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}x"
        goal = "-" if row.goal is None else f"{row.goal:g}x {'reached' if (row.ratio or 0) >= row.goal else 'MISSED'}"
        lines.append((row.name, row.ours, row.peer, ratio, goal))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
