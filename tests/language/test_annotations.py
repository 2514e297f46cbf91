import csv
import json

import pytest

from tubelet.config import ConfigError
from tubelet.language.annotations import (
    Captions,
    Question,
    find_videos,
    frequent_answers,
    read_captions,
    read_questions,
)

KEY = "data.dataset_train"


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_captions_of_msrvtt_have_splits(tmp_path):
    path = write(
        tmp_path / "train_val_videodatainfo.json",
        {
            "info": {},
            "videos": [{"video_id": "video0", "split": "train"}, {"video_id": "video1", "split": "validate"}],
            "sentences": [
                {"caption": "a cat  sits", "video_id": "video0", "sen_id": 0},
                {"caption": "a dog runs", "video_id": "video1", "sen_id": 1},
                {"caption": "the cat", "video_id": "video0", "sen_id": 2},
            ],
        },
    )
    cat, dog = Captions("video0", ("a cat sits", "the cat")), Captions("video1", ("a dog runs",))
    assert read_captions(path, KEY) == ([cat, dog], 0)
    assert read_captions(path, KEY, "validate") == ([dog], 0)
    with pytest.raises(ConfigError, match="its splits are train, validate"):
        read_captions(path, KEY, "val")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vatex.json", [{"videoID": "a_1_2", "enCap": ["one", "two"], "chCap": []}]),
        ("own.json", [{"video": "a_1_2", "captions": ["one", "two"]}]),
        ("own.jsonl", '{"video": "a_1_2", "caption": "one"}\n\n{"video": "a_1_2", "caption": "two"}\n'),
        ("msrvtt_1ka.csv", "key,video_id,sentence\nret0,a_1_2,one\nret1,a_1_2,two\n"),
    ],
)
def test_captions_in_other_formats(tmp_path, name, content):
    assert read_captions(write(tmp_path / name, content), KEY) == ([Captions("a_1_2", ("one", "two"))], 0)


def test_empty_captions_are_counted(tmp_path, caplog):
    rows = [{"video": "a", "captions": ["one", " ", None]}, {"video": "b", "captions": [""]}]
    path = write(tmp_path / "a.json", [*rows, {"video": "c", "captions": []}])
    assert read_captions(path, KEY) == ([Captions("a", ("one",))], 4)
    assert "4 empty captions are left out" in caplog.text


def test_open_ended_questions(tmp_path):
    rows = [{"answer": "guitar", "id": 0, "question": "what is played?", "video_id": 6513, "category_id": 1}]
    path = write(tmp_path / "train_qa.json", rows)
    assert read_questions(path, KEY) == [Question("6513", "what is played?", "guitar", "what")]


def test_multiple_choice_questions(tmp_path):
    path = tmp_path / "val.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["video", "frame_count", "width", "height", "question", "answer", "qid", "type", "a0", "a1", "a2", "a3"]
        )
        writer.writerow([411, 369, 640, 480, "how, then,\ndoes it end", 2, 0, "TN", "well", "", "badly, sadly", ""])
    assert read_questions(str(path), KEY) == [
        Question("411", "how, then,\ndoes it end", "badly, sadly", "TN", ("well", "badly, sadly"))
    ]
    path.write_text(path.read_text().replace(",2,0,TN", ",1,0,TN"))
    with pytest.raises(ConfigError, match="entry 1: answer is '1', expected one of the options 0, 2"):
        read_questions(str(path), KEY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: this is no JSON"),
        ([{"video": "a"}], r"entry 1: no caption or captions"),
        ([{"caption": "a"}], r"entry 1: no video_id or"),
        ([], "no caption"),
        ({"a": 1}, "expected MSR-VTT's keys"),
    ],
)
def test_wrong_lists_are_refused(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        read_captions(write(tmp_path / "a.json", content), KEY)
    with pytest.raises(ConfigError, match="No such file"):
        read_captions(str(tmp_path / "b.json"), KEY)


def test_videos_are_found_by_identifier(tmp_path, caplog):
    (tmp_path / "below").mkdir()
    for name in ("a.mp4", "below/video12.webm", "vid7.avi", "notes.txt"):
        (tmp_path / name).touch()
    found = find_videos(["a", "12", "7", "a", "a.mp4", "missing"], str(tmp_path), "data.videos")
    assert {key: path.removeprefix(f"{tmp_path}/") for key, path in found.items()} == {
        "a": "a.mp4",
        "12": "below/video12.webm",
        "7": "vid7.avi",
        "a.mp4": "a.mp4",
    }
    assert "1 of 5 videos are not in" in caplog.text
    with pytest.raises(ConfigError, match="none of the 1 videos"):
        find_videos(["x"], str(tmp_path), "data.videos")
    (tmp_path / "below/a.webm").touch()
    assert find_videos(["7"], str(tmp_path), "data.videos")
    with pytest.raises(ConfigError, match=r"a may be .*/a.mp4 or .*/below/a.webm; remove one"):
        find_videos(["a"], str(tmp_path), "data.videos")


def test_frequent_answers():
    assert frequent_answers("abcbcc", 2) == ["c", "b"]
