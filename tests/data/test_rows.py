import pickle

import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data import text_list
from tubelet.data.rows import Joined, Numbers, Strings, join_numbers, join_strings
from tubelet.data.sources import read_list
from tubelet.data.text_list import TextLines

NAMES = ["a", "", "ü b", "\udcff.mp4", "a/b.mp4"]


def assert_like(rows, items):
    """`rows` behaves like the list `items`."""
    assert rows == items
    assert list(rows) == items
    assert [rows[i] for i in range(-len(items), len(items))] == items + items
    assert rows[1:4] == items[1:4]
    assert rows[::-2] == items[::-2]
    assert rows != [*items, items[0]]
    assert rows != items[:-1]
    for index in (len(items), -len(items) - 1):
        with pytest.raises(IndexError):
            rows[index]
    assert pickle.loads(pickle.dumps(rows)) == items


def test_packed_strings_are_the_strings():
    assert_like(Strings(NAMES), NAMES)
    assert_like(join_strings([NAMES, ["c"], Strings(["d", "e"])]), [*NAMES, "c", "d", "e"])


def test_numbers_are_python_numbers_and_an_array_without_a_copy():
    array = np.array([3, -1, 7, 2, 2], dtype=np.int32)
    assert_like(Numbers(array), array.tolist())
    assert type(Numbers(array)[0]) is int
    assert np.asarray(Numbers(array)) is array
    joined = join_numbers([[4, 5], Numbers(array)])
    assert_like(joined, [4, 5, *array.tolist()])
    np.testing.assert_array_equal(np.asarray(joined), [4, 5, *array])


def test_joined_parts_may_be_empty():
    empty = Numbers(np.array([], int))
    assert_like(Joined([empty, Numbers(np.array([1, 2, 3])), empty]), [1, 2, 3])


@pytest.mark.parametrize(
    "content", ["a\nb", "\n\n a \r\n\t\n\nbb\n", "\ufeffa\n \nb c\n", "a", " ", "", "x\n" * 50 + " \n" * 3]
)
@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_lines_and_their_numbers_are_those_of_a_text_file(tmp_path, monkeypatch, content, chunk):
    monkeypatch.setattr(text_list, "_CHUNK", chunk)
    monkeypatch.setattr(text_list, "ROWS_AT_ONCE", 3)
    (tmp_path / "list").write_bytes(content.encode())
    expected = [
        (number, line.strip())
        for number, line in enumerate(content.removeprefix("\ufeff").split("\n"), start=1)
        if line.strip()
    ]
    lines = TextLines(tmp_path / "list")
    assert list(lines) == [lines[i] for i in range(len(lines))] == [line for _, line in expected]
    assert [lines.line_number(i) for i in range(len(lines))] == [number for number, _ in expected]


def test_a_list_is_pickled_by_its_name_and_a_changed_one_is_an_error(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_text("a.mp4 3\n" * 10_000)
    source = read_list(tmp_path / "list.csv")
    assert len(pickle.dumps(source)) < 2000
    again = pickle.loads(pickle.dumps(source))
    assert again.paths == [str(tmp_path / "a.mp4")] * 10_000
    assert again.labels == [3] * 10_000
    np.testing.assert_array_equal(np.asarray(again.labels), [3] * 10_000)
    pickled = pickle.dumps(source)
    (tmp_path / "list.csv").write_text("a.mp4 3\n")
    with pytest.raises(ConfigError, match=r"list.csv was changed while it is in use"):
        pickle.loads(pickled)


def test_lines_that_are_not_checked_at_the_start_are_checked_when_they_are_used(tmp_path, monkeypatch):
    monkeypatch.setattr(text_list, "MAX_CHECKED", 2)  # the first and the last
    (tmp_path / "a.mp4").touch()
    (tmp_path / "list.csv").write_text("a.mp4 1\n\nb.mp4 cat\na.mp4 0\n")
    source = read_list(tmp_path / "list.csv")
    assert source.labels[2] == 0
    for column in source[:2]:
        for read in (lambda column=column: column[1], lambda column=column: list(column)):
            with pytest.raises(ConfigError, match=r"list.csv, line 3: 'b.mp4 cat' does not end in a label"):
                read()
    (tmp_path / "list.csv").write_text("a.mp4\nb.mp4 2\na.mp4\n")
    with pytest.raises(ConfigError, match="line 2: 'b.mp4 2' ends in a label, unlike the other lines"):
        read_list(tmp_path / "list.csv").paths[1]
