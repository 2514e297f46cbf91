import logging
import pickle
import time

import pytest
import torch

from tests.processes import run as run_on_processes
from tubelet.data import BadFile, Batch
from tubelet.data.bad_files import BadFiles, NoReplacement, TooManyBadFiles


def batch(good, *bad):
    """The first samples, so many, and the paths of files that could not be read."""
    files = tuple(BadFile(path, "cannot decode\nframes", filtered=path.startswith("short")) for path in bad)
    return Batch({}, {}, torch.arange(good), ("x.mp4",) * good, torch.zeros(good, 1, 4), 0, files)


def lines(folder):
    return (folder / "bad_files.txt").read_text().splitlines()


def test_a_file_is_listed_and_reported_once_even_after_a_restart(tmp_path, caplog):
    bad_files = BadFiles(tmp_path / "bad_files.txt", 0.5)
    for _ in range(3):
        bad_files.record(batch(2, "a b.mp4", "short.mp4"))
        bad_files.sync()
    assert bad_files.num_draws == 9  # files excluded by an option do not count
    resumed = BadFiles(tmp_path / "bad_files.txt", 0.5)
    resumed.record(batch(2, "c.mp4", "a b.mp4"))
    assert lines(tmp_path) == [f"{path}\tcannot decode frames" for path in ("a b.mp4", "short.mp4", "c.mp4")]
    messages = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [message.split(":")[0] for message in messages] == ["skipped a b.mp4", "skipped short.mp4", "skipped c.mp4"]


def test_too_large_a_fraction_is_an_error_with_the_list(tmp_path):
    bad_files = BadFiles(tmp_path / "bad_files.txt", 0.25)
    bad_files.record(batch(6, "a.mp4", "short.mp4", "b.mp4"))
    for _ in range(60):
        bad_files.record(batch(2, "a.mp4"))  # each video counts once
        bad_files.sync()
    bad_files.record(batch(6, "c.mp4"))
    with pytest.raises(
        TooManyBadFiles, match=r"(?s)3 of the 9 .*max_bad_fraction 0.25.*a\.mp4\t.*b\.mp4.*c\.mp4"
    ) as error:
        bad_files.sync()
    assert "short" not in str(error.value)


def test_few_draws_are_no_error(tmp_path):
    bad_files = BadFiles(tmp_path / "bad_files.txt", 0.05)
    bad_files.record(batch(0, "a.mp4"))
    bad_files.sync()


def of_two_processes(folder, world):
    bad_files = BadFiles(folder / "bad_files.txt", 0.3, world)
    if world.rank == 1:
        time.sleep(0.2)
    bad_files.record(batch(10, "both.mp4", f"rank {world.rank}.mp4"))
    for _ in range(5):
        bad_files.record(batch(10, "both.mp4"))
    if world.rank == 1 and (folder / "bad_files.txt").exists():
        assert "rank 1" not in (folder / "bad_files.txt").read_text()  # rank 0 alone writes
    bad_files.sync()
    bad_files.record(batch(0, "both.mp4", f"rank {world.rank}.mp4", f"late {world.rank}.mp4", "x.mp4"))
    with pytest.raises(TooManyBadFiles) as error:
        bad_files.sync()
    reasons = world.all_gather_object(str(error.value))
    assert reasons[0].startswith("6 of the 16 videos drawn so far")
    assert "rank 1.mp4" in reasons[0]
    assert "late 1.mp4" in reasons[0]
    assert {line.split("\t")[0] for line in reasons[0].splitlines()} == {
        line.split("\t")[0] for line in reasons[1].splitlines()
    }


def test_processes_list_each_file_once_and_stop_together(tmp_path):
    run_on_processes(of_two_processes, tmp_path, 2)
    paths = [line.split("\t")[0] for line in lines(tmp_path)]
    assert sorted(paths) == ["both.mp4", "late 0.mp4", "late 1.mp4", "rank 0.mp4", "rank 1.mp4", "x.mp4"]


def test_the_error_of_a_worker_arrives_with_its_files():
    error = pickle.loads(pickle.dumps(NoReplacement("too many:", (BadFile("a.mp4", "cannot\nopen"),))))  # noqa: S301
    assert str(error) == "too many:\n  a.mp4\tcannot open"
    assert error.files[0].path == "a.mp4"
