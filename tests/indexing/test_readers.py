import os
import signal
import time
from pathlib import Path

from tubelet.indexing.readers import Readers


def work(name):
    if name.startswith("crash"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("exit"):
        os._exit(3)
    if name.startswith("hang"):
        time.sleep(1000)
    return name.upper()


def test_each_task_has_its_result_and_bad_ones_their_reason():
    names = [*map(str, range(40)), "crash", "hang", "exit", "hang 2", *map(str, range(40, 60))]
    with Readers(work, 3, seconds=1.0, failed=lambda reason: f"failed: {reason}") as readers:
        found = {name: result for (name,), result in readers.map((name,) for name in names)}
        again = {name: result for (name,), result in readers.map((name,) for name in "abc")}
    assert found.keys() == set(names)
    assert found.pop("crash") == "failed: its reader crashed (SIGKILL)"
    assert found.pop("exit") == "failed: its reader crashed (status 3)"
    assert {found.pop("hang"), found.pop("hang 2")} == {"failed: took longer than 1 seconds"}
    assert found == {name: name for name in found}
    assert again == {"a": "A", "b": "B", "c": "C"}


def pid_of(_):
    return os.getpid()


def test_readers_end_with_their_parent():
    pids, write = os.pipe()
    if not (parent := os.fork()):  # a process that is killed while its readers wait
        readers = Readers(pid_of, 2, 9.0, str)
        os.write(write, " ".join(str(pid) for _, pid in readers.map([(1,), (2,)])).encode())
        time.sleep(100)
    started = [int(pid) for pid in os.read(pids, 100).split()]
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in started):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
