"""Stop signals: a run ends after its current step, not in the middle of it."""

import signal
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class SignalHandler:
    """Records stop signals instead of acting on them. A second Ctrl-C raises KeyboardInterrupt.

    Example:
        >>> with SignalHandler() as interruption:
        ...     for batch in loader:
        ...         train_step(batch)
        ...         if interruption.signal is not None:
        ...             break
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The last stop signal received."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalHandler":
        self._previous = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
