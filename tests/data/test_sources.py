import os
from pathlib import Path

import pytest

from tubelet.config import ConfigError
from tubelet.data.sources import VIDEO_SUFFIXES, read_list, read_source, write_list
from tubelet.data.text_list import parse_line


@pytest.mark.parametrize(
    ("line", "path", "label"),
    [
        ("a.mp4 3", "a.mp4", 3),
        ("a.mp4 0", "a.mp4", 0),
        ("my clips/a b.mp4 12", "my clips/a b.mp4", 12),
        ('"my clips/a b.mp4" 12', "my clips/a b.mp4", 12),
        ("'my clips/a b.mp4' 12", "my clips/a b.mp4", 12),
        ("my clips/a b.mp4,12", "my clips/a b.mp4", 12),
        ("my clips/a b.mp4, 12", "my clips/a b.mp4", 12),
        ("my clips/a b.mp4\t12", "my clips/a b.mp4", 12),
        ('"a, ""b"".mp4",12', 'a, "b".mp4', 12),
        ("a,b.mp4 1", "a,b.mp4", 1),
        ("take 2.mp4", "take 2.mp4", -1),
        ('"take 2.mp4"', "take 2.mp4", -1),
        ("it's.mp4 1", "it's.mp4", 1),
        ("Übung ö.mp4 1", "Übung ö.mp4", 1),
    ],
)
def test_lines_of_a_list(line, path, label):
    assert parse_line(line) == (path, label)


def read(entry):
    return read_source(str(entry), VIDEO_SUFFIXES)


def test_folder_is_searched_recursively_in_order_and_follows_links_once(tmp_path):
    for name in ("b.MP4", "a.webm", "deep/er/c.avi", ".hidden.mp4", "._a.mp4", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "deep" / "cycle")
    paths = [os.path.relpath(path, tmp_path) for path in read(tmp_path).paths]
    assert paths == ["a.webm", "b.MP4", "deep/er/c.avi"]
    assert read(tmp_path).labels == [-1, -1, -1]


def test_paths_are_relative_to_the_list_or_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "lists").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "lists" / "a b.mp4").touch()
    (tmp_path / "here" / "c.mp4").touch()
    (tmp_path / "d.mp4").touch()
    listed = tmp_path / "lists" / "train.csv"
    listed.write_text(f"\ufeffa b.mp4 1\n\n c.mp4,2 \r\n{tmp_path / 'd.mp4'}\t0\n", encoding="utf-8")
    source = read(listed)
    assert source.labels == [1, 2, 0]
    assert all(os.path.exists(path) for path in source.paths)
    assert source.paths[0] == str(tmp_path / "lists" / "a b.mp4")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the list is empty"),
        ("\n \n", "the list is empty"),
        (
            "a.mp4 1\ngone.mp4 2\nlost one.mp4 0\n",
            "(?s)2 of 3 checked files do not exist.*line 2: .*line 3: lost one.mp4",
        ),
        ("a.mp4 1\na.mp4 cat\n", "line 2: 'a.mp4 cat' does not end in a label"),
        ("path,label\na.mp4,1\n", "line 1: 'path,label' does not end in a label"),
        ("a.mp4 -1\n", "do not exist"),
    ],
)
def test_the_error_of_an_invalid_list_names_the_line(tmp_path, content, message):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "list.csv")


def test_missing_folders_and_files_are_an_error(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(ConfigError, match="no file of a known type in this folder or below"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="no such folder, list or file"):
        read(tmp_path / "gone")
    with pytest.raises(ConfigError, match="neither a folder, nor a list"):
        read(tmp_path / "notes.md")


def test_a_written_list_is_read_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    videos = [Path(name) for name in ("a b.mp4", 'the "best", 2.mp4', "take 3.mp4", "ü.mp4")]
    for video in videos:
        video.touch()
    write_list(Path("labelled.csv"), videos, [3, 0, 1, 1])
    write_list(Path("unlabelled.csv"), videos)
    absolute = [str(tmp_path / video) for video in videos]
    monkeypatch.chdir("/")
    assert read_list(tmp_path / "labelled.csv")[:2] == (absolute, [3, 0, 1, 1])
    assert read_list(tmp_path / "unlabelled.csv")[:2] == (absolute, [-1] * 4)


def test_a_label_is_a_number_of_at_most_nine_digits(tmp_path):
    (tmp_path / "list.csv").write_text("a.mp4 99999999999999999999\n")
    with pytest.raises(ConfigError, match="line 1: a.mp4 99999999999999999999"):
        read(tmp_path / "list.csv")
