"""Where a program runs: on the devices that are asked for, or at the place that torchrun or srun gave it."""

import argparse
import sys

import pytest

from tubelet.config import ConfigError
from tubelet.runtime import distributed, launch


class Program:
    def __init__(self):
        self.worlds = []

    def run(self, world):
        self.worlds.append(world)


def asked(devices=None, processes=1):
    return argparse.Namespace(devices=devices, processes=processes)


def test_a_shell_on_a_node_does_not_take_the_place_of_what_is_asked_for(monkeypatch):
    spawned = []
    module = sys.modules["torch.multiprocessing.spawn"]  # the package has a function of that name
    monkeypatch.setattr(module, "spawn", lambda function, args, nprocs: spawned.append(nprocs))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    launch._start(Program(), asked(["cpu"], processes=3))
    assert spawned == [3]


def test_a_place_among_several_wins(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setattr(distributed, "init_from_environment", lambda on_cpu: f"its place, on cpu: {on_cpu}")
    program = Program()
    launch._start(program, asked(["cpu"], processes=3))
    assert program.worlds == ["its place, on cpu: True"]


@pytest.mark.parametrize("device", ["cuda0", "cuda:0,cuda:1", "gpu"])
def test_devices_that_are_none_are_refused(device):
    with pytest.raises(ConfigError, match="expected cpu, or cuda:0 cuda:1"):
        launch._devices(asked([device]))
