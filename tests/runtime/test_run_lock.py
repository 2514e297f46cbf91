"""The lock on a run folder has one holder, is gone with its process, and says what is wrong with the folder."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest

from app.index.options import Options as Index
from app.pack.options import Options as Pack
from app.study.options import Options as Study
from app.zoo.__main__ import Options as Zoo
from tubelet import config
from tubelet.config import Config, ConfigError
from tubelet.runtime import run_lock
from tubelet.runtime.run_lock import Lock, holding, locks_of

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def hold():
    """`hold(lock)`: a process that holds a lock, once it does."""
    processes = []

    def start(lock, child=False):
        ready = FORK.Event()
        processes.append(FORK.Process(target=keep, args=(lock, ready, child)))
        processes[-1].start()
        assert ready.wait(30)
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.join()


def keep(lock, ready, with_child):
    with holding([lock]):
        if with_child:
            FORK.Process(target=time.sleep, args=(20,)).start()
        ready.set()
        time.sleep(60)


def test_second_holder_is_refused_and_told_who_the_first_is(tmp_path, hold):
    process = hold(Lock(tmp_path / "run"))
    with pytest.raises(ConfigError) as error, holding([Lock(tmp_path / "run")]):
        pass
    for words in (f"folder: {tmp_path}/run is in use by process {process.pid} on ", "since 20", "choose another"):
        assert words in str(error.value)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_lock_ends_with_its_holder_even_if_a_child_of_it_lives_on(tmp_path, hold, number):
    process = hold(Lock(tmp_path), child=True)
    os.kill(process.pid, number)
    process.join()
    assert (tmp_path / run_lock.NAME).exists()  # a file that was left behind is no lock
    with holding([Lock(tmp_path)]):
        assert json.loads((tmp_path / run_lock.NAME).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_folder_that_was_made_for_the_lock_is_removed_unless_something_was_written(tmp_path):
    with pytest.raises(ConfigError, match="wrong"), holding([Lock(tmp_path / "a" / "run")]):
        raise ConfigError("wrong")
    assert not (tmp_path / "a" / "run").exists()
    with holding([Lock(tmp_path / "run")]):
        (tmp_path / "run" / "log.jsonl").write_text("")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.jsonl"]


def test_shared_locks_exclude_only_others(tmp_path, hold):
    hold(Lock(tmp_path, shared=True))
    with holding([Lock(tmp_path, shared=True)]):
        pass
    with pytest.raises(ConfigError, match="in use"), holding([Lock(tmp_path)]):
        pass


def test_lock_of_a_file_that_its_holder_removes_meanwhile_is_taken_again(tmp_path, monkeypatch):
    opened = run_lock._open

    def open_removed_file(path):
        monkeypatch.setattr(run_lock, "_open", opened)
        file = opened(path)
        path.unlink()
        return file

    monkeypatch.setattr(run_lock, "_open", open_removed_file)
    with holding([Lock(tmp_path)]):
        assert (tmp_path / run_lock.NAME).exists()


def test_every_program_locks_its_folder_and_tasks_of_an_array_share_theirs(tmp_path, hold):
    class Options(Config):
        folder: str

    assert locks_of(Options(folder="x")) == [Lock(run_lock.Path("x"))]
    data = {"datasets": ["videos"]}
    assert [lock.shared for lock in locks_of(Index(folder="x", data=data))] == [True]
    tasks = [locks_of(Pack(folder="x", output=str(tmp_path), data=data, task=task, tasks=2)) for task in range(2)]
    for lock in tasks[0]:
        hold(lock)
    with holding(tasks[1]):
        pass
    with pytest.raises(ConfigError, match="in use"), holding(tasks[0]):
        pass
    assert not locks_of(Pack(folder="x", data=data))[0].shared


def test_leftovers_are_removed_only_where_nobody_else_writes(tmp_path):
    left = tmp_path / f"config.yaml.{'0' * 32}.tmp"
    left.write_text("")
    for lock in (Lock(tmp_path, shared=True), Lock(tmp_path, name=".lock-0")):
        with holding([lock]):
            assert left.exists()
    with holding([Lock(tmp_path)]):
        assert not left.exists()


def test_a_study_does_not_lock_out_its_children(tmp_path, hold):
    study = config.load("configs/study/demo.yaml", [f"folder={tmp_path}"], Study)
    zoo = Zoo(folder=str(tmp_path), encoders="x", clips={}, study={})
    for lock in (*locks_of(study), *locks_of(zoo)):
        hold(lock)
    with holding([Lock(tmp_path)]):  # that of the first pretraining
        pass
    with pytest.raises(ConfigError, match="in use"), holding(locks_of(study)):
        pass


def test_file_systems_without_locks_are_warned_about(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with holding([Lock(tmp_path)]):
        assert "has no locks (No locks available), so a second start of the run is not noticed" in caplog.text


def test_requeued_job_waits_for_its_earlier_start(tmp_path, hold, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    process = hold(Lock(tmp_path))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    slept = []
    monkeypatch.setattr(run_lock.time, "sleep", lambda seconds: (slept.append(seconds), process.kill(), process.join()))
    with holding([Lock(tmp_path)]):
        assert slept == [1]


def test_folder_that_is_a_file_or_below_one_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=rf"folder: {folder}: it, or a part of its path, is not a folder"):
            run_lock._open(folder / run_lock.NAME)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EACCES, r"cannot be written \(Permission denied\); choose another folder"),
        (errno.EROFS, r"cannot be written \(Read-only file system\); choose another folder"),
        (errno.ENOSPC, r"cannot be written \(No space left on device\); make room, or choose another folder"),
    ],
)
def test_folder_that_cannot_be_written_is_explained(tmp_path, monkeypatch, number, message):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(ConfigError, match=message), holding([Lock(tmp_path)]):
        pass
