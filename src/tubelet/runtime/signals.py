"""Signals that end a run at the end of its step instead of in the middle."""

import signal

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class SignalHandler:
    """In `with SignalHandler() as interruption:` a signal only sets `interruption.signal`; a second Ctrl-C kills."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict = {}

    def __enter__(self) -> "SignalHandler":
        self._before = {number: signal.signal(number, self._note) for number in CAUGHT}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
