"""Which processes a program is started in, and what signals do to them."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tubelet.config import ConfigError
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


@pytest.mark.parametrize("device", ["cuda0", "cuda:0,cuda:1", "gpu"])
def test_invalid_devices_are_refused(device):
    with pytest.raises(ConfigError, match="expected cpu, or cuda:0 cuda:1"):
        launch._devices(arguments([device]))


def test_cuda_without_an_index_is_the_first_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch._devices(arguments(["cuda"])) == ["cuda:0"]
    with pytest.raises(ConfigError, match=r"--devices cuda:1: this machine has 1 CUDA device\(s\)"):
        launch._devices(arguments(["cuda:1"]))


def test_overrides_may_follow_devices_and_file_names_may_have_an_equals_sign():
    argv = ["a.b=1", "--fname", "x=y.yaml", "--devices", "cpu", "cpu", "folder=z", "--processes", "2"]
    parsed = launch._parse_arguments("app", argv)
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
        while interruption.signal is None:
            time.sleep(0.05)
        time.sleep(1)
        stopped_by = world.max(int(interruption.signal))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "number"),
    [(os.kill, signal.SIGTERM), (os.killpg, signal.SIGTERM), (os.killpg, signal.SIGINT)],
    ids=["SIGTERM to the parent", "SIGTERM to the group", "Ctrl-C"],
)
def test_a_stop_signal_lets_all_processes_finish_their_step_and_save(start, tmp_path, send, number):
    process = start("--processes", "2")
    wait_for(lambda: all((tmp_path / f"training-{rank}").exists() for rank in range(2)), process)
    time.sleep(0.1)
    send(process.pid, number)
    assert process.wait(60) == 128 + number
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2
    assert (tmp_path / "output").read_text() == ""
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"training-{rank}").read_text()), 0)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_while_starting_prints_no_traceback(start, tmp_path, processes):
    process = start("--processes", str(processes))
    wait_for(lambda: b"torch" in Path(f"/proc/{process.pid}/maps").read_bytes(), process)  # it imports torch
    if processes == 2:
        wait_for(lambda: _children(process.pid), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert (tmp_path / "output").read_text() == "stopped\n"


def _children(pid):
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
