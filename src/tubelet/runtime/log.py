"""Log messages of programs, on stderr."""

import logging
import sys

from tqdm import tqdm

PACKAGES = ("tubelet", "app", "evals")
"""Loggers whose INFO messages are shown; those of other libraries are shown from WARNING on."""


def setup_logging(rank: int = 0) -> None:
    """Print messages and Python warnings on stderr, e.g. `warning: <message>`.

    Rank 0 prints from INFO on; other ranks print from WARNING on, with the prefix `[rank N]`. Further calls replace
    the earlier setting.
    """
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, _Handler):
            root.removeHandler(handler)
    handler = _Handler()
    handler.setFormatter(_Formatter(rank))
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.captureWarnings(True)


class _Handler(logging.Handler):
    """Writes on the present `sys.stderr`, on a terminal above the progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
            if sys.stderr.isatty():
                tqdm.write(message, file=sys.stderr)
            else:
                print(message, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class _Formatter(logging.Formatter):
    def __init__(self, rank: int):
        super().__init__()
        self.prefix = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        return f"{self.prefix}{level}{super().format(record).rstrip()}"
