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
name, seconds, *flags = sys.argv[1:]
with open("events.txt", "a") as events:
    events.write(f"start {name}\\n")
print("hello from", name)
time.sleep(float(seconds))
if "fail" in flags:
    print("the disk is full", file=sys.stderr)
    sys.exit(3)
with open("events.txt", "a") as events:
    events.write(f"end {name}\\n")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(name, *flags, seconds=0.0, after=(), settings=None, **options):
    command = ("worker", name, str(seconds), *flags)
    return Job(name, "stage", command, Path("out") / name, settings or {"a": 1}, 1.0, after, **options)


def events(folder):
    path = folder / "events.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    path.write_text("")
    return lines


def test_jobs_wait_for_their_dependencies_and_at_most_two_run(folder):
    jobs = [job("b", after=("a",)), job("a", seconds=0.4), job("c", seconds=0.4), job("d")]
    spent = Pool(processes=2).run(jobs)
    seen = events(folder)
    assert seen.index("start b") > seen.index("end a")
    running = most = 0
    for event in seen:
        running += 1 if event.startswith("start") else -1
        most = max(most, running)
    assert most == 2
    assert spent["stage"] >= 0.8
    assert "hello from c" in (folder / "out/c/output.log").read_text()


def test_finished_jobs_are_skipped_and_unfinished_ones_resume_in_their_folder(folder):
    with pytest.raises(JobFailed):
        Pool(processes=1).run([job("a"), job("b", "fail")])
    (folder / "out/b/partial").touch()
    events(folder)
    spent = Pool(processes=1).run([job("a"), job("b")])
    assert events(folder) == ["start b", "end b"]
    assert (folder / "out/b/partial").exists()
    assert spent["stage"] > 0
    Pool().run([job("a"), job("b")])
    assert events(folder) == []


def test_jobs_with_changed_settings_run_again_with_all_that_depend_on_them(folder):
    chain = [job("a"), job("b", after=("a",)), job("c", after=("b",)), job("d")]
    Pool(processes=1).run(chain)
    (folder / "out/b/old").touch()
    events(folder)
    chain[0] = job("a", settings={"a": 2})
    Pool(processes=1).run(chain)
    assert events(folder) == [f"{what} {name}" for name in "abc" for what in ("start", "end")]
    assert not (folder / "out/b/old").exists()


def test_results_to_keep_are_not_deleted_when_settings_change(folder):
    Pool().run([job("a", keep=True, settings={"lr": {"peak": 1}})])
    with pytest.raises(ConfigError, match=r"lr\.peak: 1 before, 2 now"):
        Pool().run([job("a", keep=True, settings={"lr": {"peak": 2}})])
    assert (folder / "out/a/done.json").exists()


def test_job_with_two_slots_runs_alone_in_a_pool_of_two(folder):
    jobs = [job("a", seconds=0.3), job("wide", slots=2, seconds=0.3), job("b", after=("wide",))]
    Pool(processes=2).run(jobs)
    assert events(folder) == [f"{what} {name}" for name in ("a", "wide", "b") for what in ("start", "end")]


def test_failure_shows_the_log_and_the_command_and_ends_the_other_jobs(folder):
    started = time.monotonic()
    with pytest.raises(JobFailed) as failure:
        Pool(processes=2).run([job("long", seconds=60), job("bad", "fail", "a b", seconds=0.5)])
    assert time.monotonic() - started < 20
    message = str(failure.value)
    assert "bad ended with exit status 3" in message
    assert "the disk is full" in message
    assert "OMP_NUM_THREADS=1 python -m worker bad 0.5 fail 'a b'" in message
    assert "end long" not in events(folder)
    assert not (folder / "out/long/done.json").exists()
    assert not (folder / "out/bad/done.json").exists()


def test_with_keep_going_only_what_depends_on_a_failed_job_is_left_out(folder, capsys):
    pool = Pool(processes=1, keep_going=True)
    jobs = [job("bad", "fail"), job("b", after=("bad",)), job("c", after=("b",)), job("d")]
    spent = pool.run(jobs)
    assert events(folder) == ["start bad", "start d", "end d"]
    assert spent["stage"] == json.loads((folder / "out/d/done.json").read_text())["seconds"]
    assert list(pool.failed) == ["bad", "b", "c"]
    assert "the disk is full" in pool.failed["bad"]
    assert pool.failed["c"] == "c was left out, as b failed"
    assert "the disk is full" in capsys.readouterr().err
    pool.run([job("bad"), *jobs[1:]])
    assert pool.failed == {}
    assert events(folder) == [f"{what} {name}" for name in ("bad", "b", "c") for what in ("start", "end")]


def test_temporary_folders_are_removed_when_the_job_is_done(folder):
    for name in ("features", "heads"):
        (folder / "out/a" / name).mkdir(parents=True)
    Pool().run([job("a", temporary=("features", "never made"))])
    assert not (folder / "out/a/features").exists()
    assert (folder / "out/a/heads").exists()


def test_a_job_that_is_already_running_is_refused(folder):
    pool = Pool()
    first = pool._start(job("a", seconds=60))
    try:
        with pytest.raises(JobFailed, match="already running"):
            Pool().run([job("a")])
    finally:
        first.wait(0)
    Pool().run([job("a")])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_children(folder, number):
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
    while len((folder / "events.txt").read_text().splitlines() if (folder / "events.txt").exists() else []) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    study.send_signal(number)
    assert study.wait(20) != 0
    children = [p for p in Path("/proc").glob("[0-9]*/cwd") if _points_to(p, folder)]
    assert children == []


def _points_to(link, folder):
    try:
        return Path(os.readlink(link)) == folder and int(link.parent.name) != os.getpid()
    except (PermissionError, FileNotFoundError):
        return False


def test_marker_has_the_duration(folder):
    Pool().run([job("a", seconds=0.3)])
    marker = json.loads((folder / "out/a/done.json").read_text())
    assert marker["seconds"] >= 0.3
    assert marker["finished"] - marker["began"] == pytest.approx(marker["seconds"], abs=0.5)


def test_estimates_are_scaled_by_the_measured_durations_of_the_stage(folder):
    jobs = [job("a"), job("b"), job("wide", slots=2)]  # estimated at 1 s each
    assert Pool(processes=2)._progress(jobs, {}) == (0, 2 + 1)
    assert Pool(processes=2)._progress(jobs, {"a": 20.0}) == (10, 40 + 1)


def test_folders_of_version_0_1_are_done(folder):
    marker = {"command": ["worker"], "settings": {"a": 1}, "began": 10.0, "finished": 12.5, "seconds": 2.5}
    (folder / "out/a").mkdir(parents=True)
    (folder / "out/a/done.json").write_text(json.dumps(marker, indent=1))
    assert Pool().run([job("a")]) == {"stage": 2.5}
    assert events(folder) == []
