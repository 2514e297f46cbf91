import logging
import subprocess
import sys

import pytest

from tubelet.runtime.log import PACKAGES, setup_logging


@pytest.fixture(autouse=True)
def restored():
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in (None, *PACKAGES)}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(False)


def test_rank_0_prints_info_and_warnings(capsys):
    setup_logging(0)
    logging.getLogger("tubelet.x").info("hello %d", 1)
    logging.getLogger("app.x").warning("careful")
    logging.getLogger("other").info("noise")
    logging.getLogger("other").error("broken")
    assert capsys.readouterr() == ("", "hello 1\nwarning: careful\nerror: broken\n")


def test_other_ranks_print_warnings_with_their_rank(capsys):
    setup_logging(3)
    logging.getLogger("tubelet.x").info("hello")
    logging.getLogger("tubelet.x").warning("careful")
    assert capsys.readouterr().err == "[rank 3] warning: careful\n"


def test_second_call_replaces_the_first(capsys):
    setup_logging(0)
    setup_logging(1)
    logging.getLogger("tubelet.x").info("hello")
    logging.getLogger("tubelet.x").warning("careful")
    assert capsys.readouterr().err == "[rank 1] warning: careful\n"


def test_traceback_follows_the_message(capsys):
    setup_logging()
    try:
        raise OSError("disk is full")
    except OSError:
        logging.getLogger("tubelet").warning("no report", exc_info=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: no report"
    assert lines[-1] == "OSError: disk is full"


def test_python_warnings_are_printed_as_messages():
    code = "from tubelet.runtime.log import setup_logging; setup_logging(2); import warnings; warnings.warn('old')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("[rank 2] warning: ")
    assert "UserWarning: old" in done.stderr


def test_message_on_a_terminal_leaves_the_progress_bar_intact(monkeypatch):
    """The bar is erased, the message printed on a line of its own, and the bar drawn again below it."""
    from tqdm import tqdm

    from tubelet.runtime.progress import progress

    class Terminal:
        text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    setup_logging()
    bar = progress(desc="run", total=2)
    logging.getLogger("tubelet").warning("careful")
    bar.close()
    before, _, after = terminal.text.partition("warning: careful\n")
    assert before.endswith("\r")
    assert "run:" in before
    assert "run:" in after
    assert tqdm._instances == type(tqdm._instances)()
