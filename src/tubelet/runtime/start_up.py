"""Ctrl-C while a program starts prints one line: importing this module installs the handler, so import it first.

The imports that follow take seconds, and a KeyboardInterrupt in the middle of one prints a long traceback, or is taken
for a missing package. Nothing has to be saved yet. In processes that are no program, such as tests, nothing changes.
"""

import os
import signal
import sys
from types import FrameType


def _exit(_number: int, _frame: FrameType | None) -> None:
    os.write(2, b"stopped\n")
    os._exit(128 + signal.SIGINT)


def finished() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_program() -> bool:
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return specification is not None and specification.name.partition(".")[0] in ("app", "evals")


def begin() -> None:
    """Install the handler. One that is another one, or none as in background jobs of a shell, stays."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit)


if _is_program():
    begin()
