"""Ctrl-C while a program starts prints one line: importing this module installs the handler, so import it first.

The imports that follow take seconds, and a KeyboardInterrupt in the middle of one prints a long traceback, or is taken
for a missing package. Nothing has to be saved yet.
"""

import os
import signal
from types import FrameType


def _exit(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(128 + signal.SIGINT)


def finished() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or someone else's
    signal.signal(signal.SIGINT, _exit)
