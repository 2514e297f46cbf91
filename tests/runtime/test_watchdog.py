"""One of two processes dies, fails or hangs: the other ends too, and says which one it was."""

import multiprocessing
import os
import re
import signal
import sys
import time

import pytest
import torch

from tubelet.runtime import distributed
from tubelet.runtime.watchdog import Watchdog

TIMEOUT = 3.0


def member(rank, address, folder, fate):
    sys.stderr = open(f"{folder}/{rank}", "w")  # noqa: SIM115 it lives as long as the process
    world = distributed.init(rank, 2, "cpu", address)
    with Watchdog(world, TIMEOUT) as watchdog:
        for step in range(4):
            watchdog.note(f"in step {step}")
            time.sleep(0.6)  # so that the note gets out
            if step == 2 and rank == 1:
                fate()
            world.sum(torch.zeros(1))
    distributed.shutdown()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ValueError("a strange video")


def hang():
    time.sleep(60)


def survive():
    pass


def run(folder, fate):
    """Exit codes and what each process said."""
    context, address = multiprocessing.get_context("fork"), distributed.free_address()
    processes = [context.Process(target=member, args=(rank, address, folder, fate)) for rank in range(2)]
    started = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=30)
    assert time.monotonic() - started < 20
    return [process.exitcode for process in processes], [(folder / str(rank)).read_text() for rank in range(2)]


@pytest.mark.parametrize(
    ("fate", "what"),
    [
        (die, r"has died \(no sign of life"),
        (fail, r"failed \(ValueError: a strange video\)"),
        (hang, r"hangs \(nothing new"),
    ],
)
def test_all_end_with_the_rank_the_host_and_what_it_did(tmp_path, fate, what):
    codes, said = run(tmp_path, fate)
    assert codes[0] == 1
    assert codes[1] == (-signal.SIGKILL if fate is die else 1)
    pattern = rf"error: the job ends, as rank 1 on \S+ {what}.*; the last it noted: in step 2"
    for text in said[: 1 if fate is die else 2]:
        assert re.search(pattern, text), text
    if fate is fail:
        assert "Traceback (most recent call last)" in said[1]
        assert re.search(r"at \S+test_watchdog\.py:\d+ in fail$", said[1], re.MULTILINE)


def test_a_run_that_goes_well_is_left_alone(tmp_path):
    assert run(tmp_path, survive) == ([0, 0], ["", ""])
