"""Progress bars."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

tqdm.monitor_interval = 0  # no monitor thread: jobs and data workers are forks of this process
LOG_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}, {remaining} left, {rate_fmt}]{postfix}\n"


def progress(
    iterable: Iterable | None = None,
    *,
    desc: str,
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    off: bool = False,
) -> tqdm:
    """Return a tqdm bar with the remaining time; where stderr is no terminal it prints a line every 30 seconds.

    Args:
        iterable: What to iterate over; None: call `update` for each item.
        desc: Text before the bar.
        total: Number of items, where `iterable` has no length.
        initial: Items done before, e.g. in the run that is resumed.
        unit: Name of one item.
        off: Show nothing, e.g. on ranks other than 0.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=desc,
        total=total,
        initial=initial,
        unit=unit,
        disable=off,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 30,
        miniters=1,
        smoothing=0.1,
        bar_format=None if terminal else LOG_LINE,
    )
