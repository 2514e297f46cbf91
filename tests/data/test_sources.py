import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data import text_list
from tubelet.data.list_forms import parse_line
from tubelet.data.segments import split_segment
from tubelet.data.sources import VIDEO_SUFFIXES, read_list, read_source, write_list


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
        ("path,label\n", "no line below that of the names of the columns"),
        ("path,label\na.mp4,1\na.mp4\n", "line 3: 'a.mp4' has 1 columns, the heading 2"),
        ("path,label\na.mp4,1\na.mp4,cat\n", "line 3: 'a.mp4,cat' has the label 'cat'; expected an integer"),
        ("path,label\na.mp4,1.5\n", "line 2: .* has the label '1.5'; expected an integer"),
        ("path,start\na.mp4,1\n", "line 1: .*names only one of start and end"),
        ("path,start_frame,end_frame\na.mp4,1,2\n", "line 1: .*not `start` and `end`, in seconds"),
        ("path,start,end\na.mp4,1,0:02\n", "line 2: .* has a start or end that is no number of seconds"),
        ("path,start,end\na.mp4,1,1\n", "line 2: .* has start 1 and end 1: expected seconds with 0 <= start < end"),
        ("path,start,end\na.mp4,0,nan\n", "line 2: .* expected seconds"),
        (
            "label,youtube_id,time_start,time_end,split\ntest,abc,1,11,train\n",
            "line 1: .*Kinetics' annotations, which name no files. Expected a list of your files, .*path,label",
        ),
        (
            "a.mp4 0 10 3\n",
            "There is a file a.mp4. If what .*: expected `path label`.* path,start,end,label, in seconds",
        ),
        ("path,split,label\na.mp4,train,1\na.mp4,val,0\n", "line 1: .*column 'split', and lines of 'train' and 'val'"),
        ("path,label,label\na.mp4,1,2\n", "line 1: .*names two columns 'label'"),
        (
            "a.mp4,0,\na.mp4,1,\n",
            "(?s)line 1: a.mp4,0,\n.*There is a file a.mp4. If the rest .*: expected `path label`",
        ),
        ("0 a.mp4\n1 a.mp4\n", "There is a file a.mp4. If the rest is no part of its name"),
        ("a.mp4|0\na.mp4|1\n", "There is a file a.mp4. If the rest is no part of its name"),
        ('"a.mp4","0"\n', "There is a file a.mp4. If the rest is no part of its name"),
        ("frames 120 3\n", "line 1: frames 120\n.*frames is a folder, as in lists of folders of frames"),
        ("frames 3\n", "frames is a folder, as in lists of folders of frames"),
        ("a.mp4 cat\na.mp4 dog\na.mp4\n", "checked files do not exist"),
        ("a.mp4 1\ra.mp4 2\r", "lines of the list end in CR alone; save it as UTF-8"),
        ("a.mp4 -1\n", "do not exist"),
    ],
)
def test_the_error_of_an_invalid_list_names_the_line(tmp_path, content, message):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "frames").mkdir()
    (tmp_path / "list.csv").write_text(content, newline="")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "list.csv")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
def test_a_list_in_utf_16_is_refused(tmp_path, encoding):
    (tmp_path / "list.csv").write_text("a.mp4 1\n", encoding=encoding)
    with pytest.raises(ConfigError, match=r"list\.csv: the list is not in UTF-8, but in UTF-16 or binary; save it as"):
        read(tmp_path / "list.csv")


NAMED = [
    ("a.mp4 cat\nb c.mp4 dog\na.mp4 dog\n", ["cat", "dog"], [0, 1, 1]),
    ("a.mp4,playing piano\nb c.mp4,air drumming\n", ["air drumming", "playing piano"], [1, 0]),
    ('"b c.mp4" "a ""dog"""\n\'a.mp4\';cat\n', ['a "dog"', "cat"], [0, 1]),
    ("a.mp4;3\nb c.mp4;0\n", [], [3, 0]),
    ("path;label\na.mp4;3\n", [], [3]),
    ("\ufeffpath\tlabel\r\nb c.mp4\tdog\r\n\r\na.mp4\tcat\r\n", ["cat", "dog"], [1, 0]),
    ('"Label","Split","Video"\n"cat, black","train","a.mp4"\n"a","train","b c.mp4"\n', ["a", "cat, black"], [1, 0]),
    ("path label\na.mp4 2\n", [], [2]),
    ("path\nb c.mp4\n", [], [-1]),
    ("path label\nb c.mp4 cat\n", ["cat"], [0]),
    ("a.mp4\nb c.mp4\n", [], [-1, -1]),
]


@pytest.mark.parametrize(("content", "classes", "labels"), NAMED)
@pytest.mark.parametrize("checked", [2, 2000])
def test_names_of_classes_are_numbered_and_separators_and_headings_are_found(
    tmp_path, monkeypatch, content, classes, labels, checked
):
    monkeypatch.setattr(text_list, "MAX_CHECKED", checked)
    for name in ("a.mp4", "b c.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text(content, newline="", encoding="utf-8")
    source = read(tmp_path / "list.csv")
    assert (source.classes, source.labels) == (classes, labels)
    assert [source.labels[i] for i in range(len(labels))] == np.asarray(source.labels).tolist() == labels
    assert all(os.path.isfile(path) for path in source.paths)
    assert pickle.loads(pickle.dumps(source)) == source


def test_a_name_of_two_files_is_that_of_a_file(tmp_path):
    for name in ("a.mp4", "a.mp4 b.mp4"):
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("a.mp4 b.mp4\na.mp4\n")
    assert [os.path.basename(path) for path in read(tmp_path / "list.txt").paths] == ["a.mp4 b.mp4", "a.mp4"]


def test_segments_are_parts_of_the_path(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_text("path,time_start,time_end,label\na.mp4,0,2.5,1\na.mp4,2.5,10,0\n")
    source = read(tmp_path / "list.csv")
    assert source.paths == [f"{tmp_path}/a.mp4#t=0,2.5", f"{tmp_path}/a.mp4#t=2.5,10"]
    assert [split_segment(path) for path in source.paths] == [
        (f"{tmp_path}/a.mp4", (0, 2.5)),
        (f"{tmp_path}/a.mp4", (2.5, 10)),
    ]
    assert source.labels == [1, 0]


def test_an_image_folder_gets_the_format_that_reads_it(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.jpg").touch()
    for entry in (tmp_path, tmp_path / "cat" / "1.jpg"):
        with pytest.raises(ConfigError, match="data.format=image_dataset reads .jpg, mixed_dataset images and videos"):
            read(entry)


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
