"""Lists with generated content, against the csv module and against readers of one obvious line."""

import csv
import io
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import bounded
from tubelet.data import text_list
from tubelet.data.list_forms import Table, form_of, parse_line
from tubelet.data.sources import write_list
from tubelet.data.text_list import LinesInMemory, TextLines

# A line cannot hold a newline; bytes that are not UTF-8 are those that os.fsdecode gives.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\n\r\0/") | st.characters(
    min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"]
)
NAMES = st.text(CHARACTERS | st.sampled_from(" ,;\t'\"#=0 1"), min_size=1, max_size=12)
LABELS = st.integers(0, 10**9 - 1)


@bounded(80)
@given(videos=st.lists(st.tuples(NAMES, LABELS), min_size=1, max_size=5), labeled=st.booleans())
def test_a_written_list_is_read_alike(tmp_path, videos, labeled):
    paths, labels = [Path(name) for name, _ in videos], [label for _, label in videos]
    write_list(tmp_path / "list.csv", paths, labels if labeled else None)
    lines = TextLines(tmp_path / "list.csv")
    form = form_of(list(lines), is_file=False)
    read = [form.parse(line) for line in lines]
    assert [entry.name for entry in read] == [str(path.absolute()) for path in paths]
    assert [entry.label for entry in read] == (labels if labeled else [-1] * len(paths))


@bounded(80)
@given(
    rows=st.lists(st.tuples(NAMES, NAMES | LABELS.map(str), LABELS), min_size=1, max_size=4),
    delimiter=st.sampled_from(",;\t"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    order=st.permutations(["path", "label", "views"]),
)
def test_a_table_is_read_as_the_csv_module_writes_it(rows, delimiter, quoting, order):
    text = io.StringIO()
    writer = csv.DictWriter(text, order, delimiter=delimiter, quoting=quoting, lineterminator="\n")
    writer.writeheader()
    rows = [(name.strip() or "a", label.strip() or "b", views) for name, label, views in rows]
    writer.writerows({"path": name, "label": label, "views": views} for name, label, views in rows)
    heading, *lines = text.getvalue().rstrip("\n").split("\n")
    assert Table.is_heading(heading)
    table = Table(heading)
    table.named = True
    for line, (name, label, _) in zip(lines, rows, strict=True):
        try:
            entry = table.parse(line)
        except ValueError:  # a name of a class is no number and no file
            assert label.lstrip("+-").replace(".", "", 1).isdecimal() or "." in label
        else:
            assert (entry.name, entry.label) == (name, label)


def slow_parse(line):
    """The longest path that leaves a separator and a number of at most nine digits."""
    digits = len(line) - len(line.rstrip("0123456789"))
    if not digits > 0:
        return None
    for start in range(len(line) - min(digits, 9), len(line)):
        before = line[:start]
        path = before.rstrip(", ;\t")
        if path and path != before:
            return path, int(line[start:])
    return None


@bounded(80)
@given(path=st.text("ab1. ", min_size=1, max_size=8), separator=st.sampled_from([" ", "  ", ",", ", ", "\t", " ; "]),
       label=st.integers(0, 10**11))  # fmt: skip
def test_unquoted_lines_are_split_where_a_slow_search_splits_them(path, separator, label):
    line = f"{path.strip() or 'a'}{separator}{label}"
    name, number = parse_line(line)
    assert (name, number) == (slow_parse(line) or (line, -1))


@bounded(80)
@given(
    content=st.lists(
        st.sampled_from([b"a", b"\n", b" ", b"\r\n", b"\t", b"\xef\xbb\xbf", b"\xc2\xa0", b"\x1c", b"\xff", b"b c"]),
        max_size=30,
    ).map(b"".join),
    chunk=st.sampled_from([1, 2, 3, 7, 1 << 20]),
    at_once=st.integers(1, 4),
)
def test_lines_are_those_of_a_slow_reader(tmp_path, content, chunk, at_once):
    (tmp_path / "list").write_bytes(content)
    expected = [
        (number, os.fsdecode(line.strip()))
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1)
        if line.strip()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_list, "_CHUNK", chunk)
        patch.setattr(text_list, "ROWS_AT_ONCE", at_once)
        for lines in (TextLines(tmp_path / "list"), LinesInMemory(content)):
            assert list(lines) == [lines[i] for i in range(len(lines))] == [line for _, line in expected]
            assert [lines.line_number(i) for i in range(len(lines))] == [number for number, _ in expected]
