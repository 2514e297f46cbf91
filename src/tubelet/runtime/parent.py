"""Processes that end with the process that started them."""

import ctypes
import os
import signal
import sys
import time
from types import TracebackType

from tubelet.runtime.signals import STOP_SIGNALS

SECONDS_TO_END = 1.0
_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent ends, also when that is killed. Linux only.

    Args:
        parent: Process id of the parent, which may have ended already.
        number: The signal; SIGTERM lets this process finish its step and save.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def leave_signals_to(parent: int) -> None:
    """Let this process end with its parent only, which kills it when it is no longer needed.

    Stop signals may reach all processes of a group, and are ignored here.

    Args:
        parent: Process id of the parent, which may have ended already.
    """
    end_with_parent(parent)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _report_unless_parent_ends


def _report_unless_parent_ends(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print the error, as threads of `multiprocessing` do by `sys.excepthook`.

    The connections of a parent that is killed end just before the kernel ends this process; the error waits for that.
    """
    if issubclass(kind, ConnectionError | EOFError):
        time.sleep(SECONDS_TO_END)
    sys.__excepthook__(kind, error, traceback)
