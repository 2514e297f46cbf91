import os
import shutil
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tubelet.config import ConfigError
from tubelet.data.index_file import open_index
from tubelet.data.sources import VIDEO_SUFFIXES, read_source, write_list
from tubelet.indexing import build as building
from tubelet.indexing.build import build
from tubelet.indexing.describe import describe
from tubelet.indexing.options import ReadingOptions
from tubelet.indexing.walk import files_below, find_files

READ = ReadingOptions()


def write(index, folder, **options):
    options = {"processes": 2, "part_size": 2, "show_progress": False} | options
    return build(index, [str(folder)], options.pop("reading", READ), **options)


def rows(index):
    return pq.read_table(index).to_pylist()


def without_nulls(row):
    return {name: value for name, value in row.items() if value is not None}


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder, which may be changed."""
    return shutil.copytree(folder, tmp_path / "copy")


def test_an_index_has_the_description_of_each_file_in_order(folder, tmp_path):
    index = tmp_path / "index.parquet"
    assert write(index, folder)
    paths = read_source(str(folder), VIDEO_SUFFIXES).paths
    expected = {path: {"path": path, **describe(path, READ)} for path in sorted(paths)}
    found = {row["path"]: without_nulls(row) for row in rows(index)}
    assert list(found) == list(expected)
    for path, row in expected.items():
        if row["readable"]:
            row["key_frame_seconds"] = pytest.approx(row["key_frame_seconds"], rel=1e-6)  # a float32
        assert found[path] == without_nulls(row)
    assert [row["readable"] for row in rows(index)] == [True, True, True, False, False, True, False]
    assert open_index(index).paths == [path for path, row in expected.items() if row["readable"]]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".parquet", ".rows"]  # no work folder is left


def test_labels_of_a_list_and_relative_paths(copy, tmp_path):
    videos = [copy / "sub dir" / "d.ts", copy / "a.mp4"]
    write_list(tmp_path / "list.csv", videos, [3, 0])
    write(copy / "index.parquet", tmp_path / "list.csv", relative=True)
    assert [(row["path"], row["label"]) for row in rows(copy / "index.parquet")] == [("a.mp4", 0), ("sub dir/d.ts", 3)]
    shutil.move(copy, tmp_path / "moved")
    moved = open_index(tmp_path / "moved" / "index.parquet")
    assert moved.paths == [str(tmp_path / "moved" / name) for name in ("a.mp4", "sub dir/d.ts")]
    assert moved.labels == [0, 3]


def test_only_new_and_changed_files_are_read_again(copy, tmp_path, monkeypatch):
    index, read = tmp_path / "index.parquet", tmp_path / "read"

    def recorded(path, options):
        with open(read, "a") as file:
            file.write(f"{Path(path).name}\n")
        return describe(path, options)

    monkeypatch.setattr(building, "describe", recorded)
    write(index, copy)
    assert len(read.read_text().split()) == 7
    first = rows(index)
    read.write_text("")
    write(index, copy)
    assert read.read_text() == ""
    assert rows(index) == first
    shutil.copy(copy / "a.mp4", copy / "new.mp4")
    os.utime(copy / "c.avi", (1, 1))
    (copy / "empty.mp4").unlink()
    write(index, copy)
    assert sorted(read.read_text().split()) == ["c.avi", "new.mp4"]
    shutil.rmtree(tmp_path / "all", ignore_errors=True)
    write(tmp_path / "all" / "index.parquet", copy)
    assert rows(tmp_path / "all" / "index.parquet") == rows(index)
    read.write_text("")
    write(index, copy, reading=ReadingOptions(content_hash="file"))  # every row is another one
    assert len(read.read_text().split()) == 7


def slow_describe(path, options):
    time.sleep(0.1)
    with open(os.environ["READ"], "a") as file:
        file.write(f"{path}\n")
    return describe(path, options)


def copies(video, number, folder):
    """A folder with so many copies of a video."""
    folder.mkdir()
    for copy in range(number):
        shutil.copy(video, folder / f"{copy:02d}.mp4")
    return folder


def test_after_a_kill_only_the_last_part_is_read_again(folder, tmp_path, monkeypatch):
    many = copies(folder / "a.mp4", 20, tmp_path / "many")
    monkeypatch.setattr(building, "describe", slow_describe)
    monkeypatch.setenv("READ", str(tmp_path / "read"))
    index = tmp_path / "index.parquet"
    child = get_context("fork").Process(target=write, args=(index, many), kwargs={"part_size": 3, "processes": 1})
    child.start()
    work = tmp_path / "index.parquet.work"
    while len(list(work.glob("part-*.parquet"))) < 3:
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not index.exists()
    assert write(index, many, part_size=3)
    read = (tmp_path / "read").read_text().split()
    assert len(set(read)) == 20
    assert len(read) <= 20 + 3 + 1  # a part, and a file that the reader had begun
    monkeypatch.setattr(building, "describe", describe)
    write(tmp_path / "at once" / "index.parquet", many, part_size=100)
    assert rows(index) == rows(tmp_path / "at once" / "index.parquet")


def test_processes_share_the_work_and_one_of_them_completes_it(folder, tmp_path, monkeypatch):
    many = copies(folder / "a.mp4", 12, tmp_path / "many")
    monkeypatch.setattr(building, "describe", slow_describe)
    monkeypatch.setattr(building, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("READ", str(tmp_path / "read"))
    context, index = get_context("fork"), tmp_path / "index.parquet"
    completed = context.SimpleQueue()

    def take_part():
        completed.put(write(index, many, part_size=1, processes=1, job="7"))

    children = [context.Process(target=take_part) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert sorted(completed.get() for _ in children) == [False, False, True]
    assert len((tmp_path / "read").read_text().split()) == 12
    assert len(rows(index)) == 12
    assert not write(index, many, job="7")  # a task of the array that starts when all is done
    assert write(index, many, job="8")


def test_a_file_that_hangs_is_a_row_with_the_reason(copy, tmp_path):
    os.mkfifo(copy / "pipe.mp4")  # opening it waits for a writer
    write(tmp_path / "index.parquet", copy, reading=ReadingOptions(file_seconds=2))
    found = {Path(row["path"]).name: row for row in rows(tmp_path / "index.parquet")}
    assert found["pipe.mp4"]["reason"] == "took longer than 2 seconds"
    assert sum(row["readable"] for row in found.values()) == 4


def test_a_name_that_is_not_utf_8_is_a_row_with_the_reason(copy, tmp_path):
    os.rename(os.fsencode(copy / "a.mp4"), os.fsencode(copy) + b"/\xff.mp4")
    write(tmp_path / "index.parquet", copy)
    bad = [row for row in rows(tmp_path / "index.parquet") if "not UTF-8" in (row["reason"] or "")]
    assert [Path(row["path"]).name for row in bad] == ["\\xff.mp4"]
    assert not bad[0]["readable"]


def test_an_unfinished_index_of_other_options_is_an_error(copy, tmp_path):
    index = tmp_path / "index.parquet"
    building.Work(index, [str(copy)], READ, 2, False)
    with pytest.raises(ConfigError, match="unfinished index with another part_size and perceptual_hash"):
        write(index, copy, part_size=3, reading=ReadingOptions(perceptual_hash=False))


def test_a_data_set_that_does_not_exist_leaves_nothing_that_its_correction_meets(copy, tmp_path):
    index = tmp_path / "index.parquet"
    with pytest.raises(ConfigError, match="no such folder"):
        write(index, copy / "gone")
    assert write(index, copy)


def test_folders_are_walked_like_those_of_the_training_data(folder, tmp_path):
    os.symlink(folder, tmp_path / "link")
    os.symlink(tmp_path, tmp_path / "cycle")
    (tmp_path / ".hidden.mp4").touch()
    (tmp_path / "e.mp4").touch()
    for walked in (folder, tmp_path):
        assert sorted(files_below(walked, VIDEO_SUFFIXES)) == sorted(read_source(str(walked), VIDEO_SUFFIXES).paths)
    files = find_files([str(tmp_path), str(tmp_path / "e.mp4"), str(tmp_path)])
    assert len(files) == len(set(files)) == 8
    with pytest.raises(ConfigError, match="no such folder"):
        find_files([str(tmp_path / "gone")])


def test_a_folder_does_not_remove_the_labels_of_a_list(copy, tmp_path):
    write_list(tmp_path / "list.csv", [copy / "a.mp4"], [3])
    write_list(tmp_path / "other.csv", [copy / "a.mp4"], [4])
    for entries in ([tmp_path / "list.csv", copy], [copy, tmp_path / "list.csv"]):
        assert dict(find_files(map(str, entries)))[str(copy / "a.mp4")] == 3
    with pytest.raises(ConfigError, match=r"a.mp4 has the labels 3 and 4"):
        find_files([str(tmp_path / "list.csv"), str(tmp_path / "other.csv")])


def test_remote_files_are_an_error_without_their_signature(tmp_path):
    (tmp_path / "list.csv").write_text("https://user:pw@host/a.mp4?Signature=secret 1\n")
    with pytest.raises(ConfigError, match="index is of local files") as error:
        find_files([str(tmp_path / "list.csv")])
    assert "secret" not in str(error.value)
    assert "pw" not in str(error.value)
    with pytest.raises(ConfigError, match="index is of local files"):
        find_files(["s3://bucket/videos"])


def test_a_file_that_could_not_be_opened_is_read_again(copy, tmp_path, monkeypatch):
    index = tmp_path / "index.parquet"

    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("tubelet.indexing.describe.content_hash", forbidden)
        write(index, copy)
    assert not any(row["readable"] for row in rows(index))
    write(index, copy)
    assert any(row["readable"] for row in rows(index))
