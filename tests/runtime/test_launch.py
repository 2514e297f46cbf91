"""Which processes a program is started in, and what signals do to them."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tubelet.runtime import distributed, launch

REPOSITORY = Path(__file__).parents[2]


class Program:
    def __init__(self):
        self.worlds = []

    def run(self, world):
        self.worlds.append(world)


def arguments(devices=None, processes=1):
    return argparse.Namespace(devices=devices, processes=processes)


def test_the_command_line_wins_in_a_step_with_one_task(monkeypatch):
    started = []
    monkeypatch.setattr(launch, "_start_processes", lambda program, devices: started.append(devices))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    launch._start(Program(), arguments(["cpu"], processes=3))
    assert started == [["cpu"] * 3]


def test_the_environment_wins_in_a_step_with_several_tasks(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setattr(distributed, "init_from_environment", lambda on_cpu: f"from srun, on cpu: {on_cpu}")
    program = Program()
    launch._start(program, arguments(["cpu"], processes=3))
    assert program.worlds == ["from srun, on cpu: True"]


def test_overrides_may_follow_devices_and_file_names_may_have_an_equals_sign():
    argv = ["a.b=1", "--fname", "x=y.yaml", "--devices", "cpu", "cpu", "folder=z", "--processes", "2"]
    parsed = launch._parse_arguments(launch.Package("app", "app", "train"), argv)
    assert (parsed.fname, parsed.devices, parsed.processes) == ("x=y.yaml", ["cpu", "cpu"], 2)
    assert parsed.overrides == ["a.b=1", "folder=z"]


# Takes steps until a stop signal comes; then it finishes the step, which takes so long that a second signal would come.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from tubelet.config import Config
from tubelet.runtime.signals import SignalHandler

class Options(Config):
    folder: str
    app: str

def main(options, world):
    folder = Path(options.folder)
    with SignalHandler() as interruption:
        (folder / f"training-{world.rank}").write_text(str(os.getpid()))
        while not (stopped_by := world.max(int(interruption.signal or 0))):
            time.sleep(0.05)
        time.sleep(1)
        (folder / f"saved-{world.rank}").write_text(str(stopped_by))
    sys.exit(128 + stopped_by)
"""


@pytest.fixture
def start(tmp_path):
    """`start(*arguments)`: `app.main` with PROGRAM, in a process group of its own."""
    (tmp_path / "app/waits").mkdir(parents=True)
    (tmp_path / "app/waits/train.py").write_text(PROGRAM)
    (tmp_path / "app/main.py").write_text((REPOSITORY / "app/main.py").read_text())
    (tmp_path / "waits.yaml").write_text(f"app: waits\nfolder: {tmp_path}\n")
    started = []

    def call(*arguments):
        command = [sys.executable, "-m", "app.main", "--fname", "waits.yaml", "--devices", "cpu", *arguments]
        environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}/src", "OMP_NUM_THREADS": "1"}

        def react_to_ctrl_c():  # which background jobs of a shell, and so their children, ignore
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        kwargs = {"cwd": tmp_path, "env": environment, "preexec_fn": react_to_ctrl_c}
        with open(tmp_path / "output", "w") as output:
            process = subprocess.Popen(command, stderr=output, **kwargs)
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition, process, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the program has ended"
        assert time.monotonic() < until
        time.sleep(0.05)


def start_two(start, folder):
    """The program in two processes that are in their loop, and the ids of the processes."""
    process = start("--processes", "2")
    files = [folder / f"training-{rank}" for rank in range(2)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files), process)
    time.sleep(0.1)
    return process, [int(file.read_text()) for file in files]


def saved(folder):
    return [(folder / f"saved-{rank}").read_text() for rank in range(2)]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "number"),
    [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGTERM), (os.killpg, signal.SIGINT), (os.kill, signal.SIGINT)],
    ids=["SIGTERM to the parent", "SIGTERM to the group", "Ctrl-C", "SIGINT to the parent"],
)
def test_a_stop_signal_lets_all_processes_finish_their_step_and_save(start, tmp_path, send, number):
    process, ranks = start_two(start, tmp_path)
    send(process.pid, number)
    assert process.wait(120) == 128 + number
    assert saved(tmp_path) == [str(int(number))] * 2
    assert (tmp_path / "output").read_text() == ""
    assert not any(map(is_running, ranks))


@pytest.mark.slow
def test_a_stop_signal_to_one_process_stops_all(start, tmp_path):
    process, ranks = start_two(start, tmp_path)
    os.kill(ranks[1], signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM
    assert saved(tmp_path) == [str(int(signal.SIGTERM))] * 2
    assert not any(map(is_running, ranks))


@pytest.mark.slow
def test_processes_save_and_end_when_their_parent_is_killed(start, tmp_path):
    process, ranks = start_two(start, tmp_path)
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while any(map(is_running, ranks)):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert saved(tmp_path) == [str(int(signal.SIGTERM))] * 2


@pytest.mark.slow
def test_a_second_ctrl_c_ends_all_processes_without_saving(start, tmp_path):
    process, ranks = start_two(start, tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) in (1, 128 + signal.SIGINT)
    assert not list(tmp_path.glob("saved-*"))
    assert not any(map(is_running, ranks))


@pytest.mark.slow
def test_a_killed_process_is_named_and_ends_the_others(start, tmp_path):
    process, ranks = start_two(start, tmp_path)
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(90) == 128 + signal.SIGKILL
    assert f"error: rank 1 (pid {ranks[1]}) was killed by SIGKILL" in (tmp_path / "output").read_text()
    assert not any(map(is_running, ranks))


@pytest.mark.slow
def test_a_second_start_in_the_same_folder_is_refused_at_once(start, tmp_path):
    process, ranks = start_two(start, tmp_path)
    second = start("--processes", "1")
    assert second.wait(120) == 1
    expected = f"error: folder: {tmp_path} is in use by process {ranks[0]} on "
    assert expected in (tmp_path / "output").read_text()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(120) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_folder_that_is_a_file_ends_two_processes_at_once_with_one_line(start, tmp_path):
    (tmp_path / "file").write_text("")
    process = start("--processes", "2", f"folder={tmp_path}/file")
    assert process.wait(120) == 1
    expected = f"error: folder: {tmp_path}/file: it, or a part of its path, is not a folder. Choose another folder=…\n"
    assert (tmp_path / "output").read_text() == expected


def test_ctrl_c_during_the_first_imports_prints_no_traceback(start, tmp_path):
    process = start()
    wait_for(lambda: b"pydantic_core" in Path(f"/proc/{process.pid}/maps").read_bytes(), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130
    assert (tmp_path / "output").read_text() == "stopped\n"


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_while_starting_prints_no_traceback(start, tmp_path, processes):
    process = start("--processes", str(processes))
    wait_for(lambda: b"torch" in Path(f"/proc/{process.pid}/maps").read_bytes(), process)  # it imports torch
    if processes == 2:
        wait_for(lambda: _children(process.pid), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 130
    assert (tmp_path / "output").read_text() == "stopped\n"


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
