"""One progress bar for all long work."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

tqdm.monitor_interval = 0  # no thread of its own: jobs and data workers are forks of this process
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
    """A tqdm bar with the time left; on a log file instead of a terminal it prints a line every 30 seconds."""
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
