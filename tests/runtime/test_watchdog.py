"""One of two ranks dies, fails or hangs: both end with a message that names it."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time

import pytest
import torch

from tubelet.config import UserError
from tubelet.runtime import distributed
from tubelet.runtime.distributed import World
from tubelet.runtime.watchdog import Watchdog, _RankStatus

TIMEOUT = 3.0


def member(rank, address, folder, fate):
    sys.stderr = open(f"{folder}/{rank}", "w")  # noqa: SIM115 it lives as long as the process
    world = distributed.init(rank, 2, "cpu", address)
    with Watchdog(world, TIMEOUT) as watchdog:
        for step in range(4):
            watchdog.note(f"in step {step}")
            time.sleep(0.6)  # until the activity is sent
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


def succeed():
    pass


def in_two_processes(target, *args):
    """Exit codes of `target(rank, address, *args)`, and the seconds that both have taken."""
    context, address = multiprocessing.get_context("fork"), distributed.free_address()
    processes = [context.Process(target=target, args=(rank, address, *args)) for rank in range(2)]
    started = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    return [process.exitcode for process in processes], time.monotonic() - started


def run(folder, fate):
    """Exit codes and the stderr of each rank."""
    exit_codes, seconds = in_two_processes(member, folder, fate)
    assert seconds < 20
    return exit_codes, [(folder / str(rank)).read_text() for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fate", "failure"),
    [
        (die, r"died \(no heartbeat"),
        (fail, r"failed \(ValueError: a strange video\)"),
        (hang, r"hangs \(no progress"),
    ],
)
def test_all_ranks_abort_with_the_rank_host_and_activity(tmp_path, fate, failure):
    codes, output = run(tmp_path, fate)
    assert codes[0] == 1
    assert codes[1] == (-signal.SIGKILL if fate is die else 1)
    pattern = rf"error: job aborted: rank 1 on \S+ {failure}.*; last activity: in step 2"
    for text in output[: 1 if fate is die else 2]:
        assert re.search(pattern, text), text
    if fate is fail:
        assert "Traceback (most recent call last)" in output[1]
        assert re.search(r"at \S+test_watchdog\.py:\d+ in fail$", output[1], re.MULTILINE)


def user_error_in(rank, address, failing, folder):
    sys.stderr = open(f"{folder}/{rank}", "w")  # noqa: SIM115 it lives as long as the process
    world = distributed.init(rank, 2, "cpu", address)
    with Watchdog(world, timeout=600.0):
        if rank == failing:
            raise UserError("the disk is full; make room")
        world.sum(torch.zeros(1))
        time.sleep(60)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_that_the_user_can_fix_ends_all_ranks_at_once_without_traceback(tmp_path, failing):
    exit_codes, seconds = in_two_processes(user_error_in, failing, tmp_path)
    assert seconds < 12  # a failure of another kind takes 3 heartbeats, 15 seconds, to be reported
    assert exit_codes == [1, 1]
    rank = f"rank {failing}: " if failing else ""
    for number in range(2):
        assert (tmp_path / str(number)).read_text() == f"error: job aborted: {rank}the disk is full; make room\n"


def test_a_run_without_failure_is_not_aborted(tmp_path):
    assert run(tmp_path, succeed) == ([0, 0], ["", ""])


class Store(dict):
    """Heartbeats of all ranks, as rank 0 reads them."""

    def check(self, keys):
        return all(key in self for key in keys)


def heartbeat(host, activity="in step 3", location="", failed=None):
    return {"host": host, "count": 1, "activity": activity, "location": location, "failed": failed}


def failure_after(seconds, *heartbeats):
    """What rank 0 finds `seconds` after these heartbeats, when all ranks still send the same."""
    watchdog = Watchdog(World(0, len(heartbeats)), timeout=60.0)
    past = time.monotonic() - seconds
    for rank, beat in enumerate(heartbeats):
        watchdog._ranks[rank] = _RankStatus(beat, past, past, past if beat["failed"] else None)
    sent = {f"heartbeat/{rank}": json.dumps({**beat, "count": 2}) for rank, beat in enumerate(heartbeats)}
    watchdog._store = Store(sent)
    return watchdog._find_failure()


def test_rank_outside_of_a_collective_is_the_one_that_hangs():
    waiting = heartbeat("n0", location="/x/torch/distributed/y.py:1 in all_reduce")
    hanging = heartbeat("n1", location="/x/loader.py:7 in read")
    assert failure_after(59, waiting, hanging) is None
    assert failure_after(61, waiting, hanging).startswith("rank 1 on n1 hangs (no progress for 61 s); last activity")


def test_first_of_several_failures_is_reported():
    second = heartbeat("n0", failed=[2, "RuntimeError: connection reset", "x.py:1 in f"])
    first = heartbeat("n1", failed=[1, "ValueError: a strange video", "y.py:2 in g"])
    expected = "rank 1 on n1 failed (ValueError: a strange video); last activity: in step 3, at y.py:2 in g"
    assert failure_after(20, second, first) == expected


def test_finished_ranks_are_not_aborted():
    finished = heartbeat("n0", activity="finished")
    assert failure_after(1000, finished, finished) is None
