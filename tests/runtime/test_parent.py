import multiprocessing
import os
import signal
import time

import pytest

from tubelet.runtime import parent

fork = multiprocessing.get_context("fork")


def report(parent_pid, log, error, wait):
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    parent.leave_signals_to(parent_pid)
    wait.wait()
    parent.sys.excepthook(type(error), error, None)


def start_and_wait(log, error, wait):
    fork.Process(target=report, args=(os.getpid(), log, error, wait), daemon=False).start()
    time.sleep(60)


@pytest.mark.parametrize("error", [ConnectionResetError("peer"), EOFError("end")])
def test_connections_that_end_with_the_parent_are_not_errors(error, tmp_path):
    log, wait = tmp_path / "log", fork.Event()
    program = fork.Process(target=start_and_wait, args=(log, error, wait))
    program.start()
    while not log.exists():
        time.sleep(0.01)
    wait.set()
    time.sleep(0.2)  # the error is there, the parent still runs
    os.kill(program.pid, signal.SIGKILL)
    program.join()
    time.sleep(parent.SECONDS_TO_END + 0.5)
    assert log.read_text() == ""


@pytest.mark.parametrize("error", [ConnectionResetError("peer"), ValueError("wrong")])
def test_other_errors_are_reported(error, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parent, "SECONDS_TO_END", 0.0)
    parent._report_unless_parent_ends(type(error), error, None)
    assert str(error) in capsys.readouterr().err
