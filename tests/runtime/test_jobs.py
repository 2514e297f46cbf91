import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tubelet.config import ConfigError
from tubelet.runtime.jobs import Job, JobFailed, Pool

WORKER = """
import sys, time
name, seconds, *words = sys.argv[1:]
with open("events.txt", "a") as events:
    events.write(f"start {name}\\n")
print("hello from", name)
time.sleep(float(seconds))
if "fail" in words:
    print("the disk is full", file=sys.stderr)
    sys.exit(3)
with open("events.txt", "a") as events:
    events.write(f"end {name}\\n")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(name, *words, seconds=0.0, after=(), settings=None, **more):
    command = ("worker", name, str(seconds), *words)
    return Job(name, "stage", command, Path("out") / name, settings or {"a": 1}, 1.0, after, **more)


def events(place):
    path = place / "events.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    path.write_text("")
    return lines


def test_jobs_wait_for_what_they_need_and_no_more_than_two_run(place):
    jobs = [job("b", after=("a",)), job("a", seconds=0.4), job("c", seconds=0.4), job("d")]
    spent = Pool(processes=2).run(jobs)
    seen = events(place)
    assert seen.index("start b") > seen.index("end a")
    running = most = 0
    for event in seen:
        running += 1 if event.startswith("start") else -1
        most = max(most, running)
    assert most == 2
    assert spent["stage"] >= 0.8
    assert "hello from c" in (place / "out/c/output.log").read_text()


def test_finished_jobs_are_skipped_and_unfinished_ones_go_on_in_their_folder(place):
    with pytest.raises(JobFailed):
        Pool(processes=1).run([job("a"), job("b", "fail")])
    (place / "out/b/partial").touch()
    events(place)
    spent = Pool(processes=1).run([job("a"), job("b")])
    assert events(place) == ["start b", "end b"]
    assert (place / "out/b/partial").exists()
    assert spent["stage"] > 0
    Pool().run([job("a"), job("b")])
    assert events(place) == []


def test_changed_settings_are_made_again_with_all_that_depends_on_them(place):
    chain = [job("a"), job("b", after=("a",)), job("c", after=("b",)), job("d")]
    Pool(processes=1).run(chain)
    (place / "out/b/old").touch()
    events(place)
    chain[0] = job("a", settings={"a": 2})
    Pool(processes=1).run(chain)
    assert events(place) == [f"{what} {name}" for name in "abc" for what in ("start", "end")]
    assert not (place / "out/b/old").exists()


def test_results_to_keep_are_not_removed_when_settings_change(place):
    Pool().run([job("a", keep=True, settings={"lr": {"peak": 1}})])
    with pytest.raises(ConfigError, match=r"lr\.peak: 1 there, 2 here"):
        Pool().run([job("a", keep=True, settings={"lr": {"peak": 2}})])
    assert (place / "out/a/done.json").exists()


def test_job_of_two_processes_runs_alone_in_a_pool_of_two(place):
    jobs = [job("a", seconds=0.3), job("wide", slots=2, seconds=0.3), job("b", after=("wide",))]
    Pool(processes=2).run(jobs)
    assert events(place) == [f"{what} {name}" for name in ("a", "wide", "b") for what in ("start", "end")]


def test_failure_says_what_happened_and_how_to_run_it_alone_and_ends_the_others(place):
    started = time.monotonic()
    with pytest.raises(JobFailed) as failure:
        Pool(processes=2).run([job("long", seconds=60), job("bad", "fail", "a b", seconds=0.5)])
    assert time.monotonic() - started < 20
    message = str(failure.value)
    assert "bad ended with exit status 3" in message
    assert "the disk is full" in message
    assert "OMP_NUM_THREADS=1 python -m worker bad 0.5 fail 'a b'" in message
    assert "end long" not in events(place)
    assert not (place / "out/long/done.json").exists()
    assert not (place / "out/bad/done.json").exists()


def test_one_folder_is_not_worked_on_twice(place):
    pool = Pool()
    first = pool._start(job("a", seconds=60))
    try:
        with pytest.raises(JobFailed, match="still running"):
            Pool().run([job("a")])
    finally:
        first.kill()
        first.join()
    Pool().run([job("a")])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_children(place, number):
    program = """
        import signal
        from pathlib import Path
        from tubelet.runtime.jobs import Job, Pool
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        jobs = [Job(n, "s", ("worker", n, "60"), Path("out") / n, {}, 1.0) for n in "ab"]
        Pool(processes=2).run(jobs)
    """
    study = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while len((place / "events.txt").read_text().splitlines() if (place / "events.txt").exists() else []) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    study.send_signal(number)
    assert study.wait(20) != 0
    children = [p for p in Path("/proc").glob("[0-9]*/cwd") if _points_to(p, place)]
    assert children == []


def _points_to(link, place):
    try:
        return Path(os.readlink(link)) == place and int(link.parent.name) != os.getpid()
    except (PermissionError, FileNotFoundError):
        return False


def test_marker_tells_how_long_it_took(place):
    Pool().run([job("a", seconds=0.3)])
    marker = json.loads((place / "out/a/done.json").read_text())
    assert marker["seconds"] >= 0.3
    assert marker["finished"] - marker["began"] == pytest.approx(marker["seconds"], abs=0.5)
