"""The forms of a list of videos: what a line says, and which form a list has.

Without a heading a line is `path`, `path label` or, where no label is a number, `path class name`, with a space, comma,
semicolon or tab before the label. Any other columns need a heading that names them, such as `path,start,end,label`.
"""

import csv
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tubelet.data.segments import fragment
from tubelet.data.suffixes import IMAGE_SUFFIXES, VIDEO_SUFFIXES

NO_LABEL = -1

# The path may be quoted, and "" within double quotes is a quote.
_QUOTED = r"""(?:"(?P<double>(?:[^"]|"")*)"|'(?P<single>[^']*)'"""
_PATH = rf"{_QUOTED}|(?P<bare>.+?))"
_SEPARATOR = r"(?:\s*[,;\t]\s*|\s+)"
_LABELED = re.compile(rf"{_PATH}{_SEPARATOR}(?P<label>\d{{1,9}})")  # a label has 32 bits
_UNLABELED = re.compile(_PATH)
_SUFFIXES = "|".join(suffix[1:] for suffix in sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
_NAMED = re.compile(rf"{_QUOTED}|(?P<bare>.+?\.(?:{_SUFFIXES}))){_SEPARATOR}(?P<label>.+)", re.IGNORECASE)
_FILE = re.compile(rf".*\.(?:{_SUFFIXES})", re.IGNORECASE)
_LABEL = re.compile(r"\d{1,9}")
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?")

# Names of columns, in lowercase; of several that are there, the first.
PATHS = ("path", "video_path", "filepath", "file_path", "filename", "file", "video")
LABELS = ("label", "label_id", "class_id", "class", "label_name", "class_name", "action")
STARTS = ("start", "start_time", "time_start", "start_sec", "start_seconds")
ENDS = ("end", "end_time", "time_end", "end_sec", "end_seconds")
SPLITS = ("split", "subset", "partition")
EXPECTED = "expected `path label` in each line, or a first line that names the columns, such as path,start,end,label"


class Entry(NamedTuple):
    """What a line says."""

    name: str
    label: int | str
    """A number from 0, the name of a class, or `NO_LABEL`."""
    segment: str = ""
    """See `segments.fragment`."""


class Form(Protocol):
    """A form of lists."""

    def parse(self, line: str) -> Entry:
        """Return what a line says. Raises ValueError, whose message follows "'<line>' ", where it has another form."""
        ...


class Plain:
    """`path` or `path label`."""

    def __init__(self, labeled: bool):
        self.labeled = labeled

    def parse(self, line: str) -> Entry:
        name, label = parse_line(line)
        if (label != NO_LABEL) != self.labeled:
            problem = "does not end in a label like" if self.labeled else "ends in a label, unlike"
            raise ValueError(
                f"{problem} the other lines; a label is an integer from 0, after the path and a space, comma or tab"
            )
        return Entry(name, label)


class Named:
    """`path class name`."""

    def parse(self, line: str) -> Entry:
        match = _NAMED.fullmatch(line)
        if match is None or _is_no_class(label := _unquoted(match["label"])):
            raise ValueError("does not end in the name of a class like the other lines")
        return Entry(_name(match), label)


class Table:
    """Columns that the first line names.

    Args:
        heading: The first line.

    Raises:
        ValueError: A column that is needed is missing.
    """

    def __init__(self, heading: str):
        self.delimiter = max(",;\t", key=heading.count)
        if self.delimiter not in heading:
            self.delimiter = " "
        self.columns = [name.lower() for name in self._fields(heading)]
        known = {*PATHS, *LABELS, *STARTS, *ENDS}
        if twice := next((name for name in self.columns if name in known and self.columns.count(name) > 1), None):
            raise ValueError(f"names two columns '{twice}'; keep the one that is meant")
        if "youtube_id" in self.columns:
            raise ValueError(
                "is the heading of Kinetics' annotations, which name no files. Expected a list of your files, with the "
                "heading path,label"
            )
        path = self._find(PATHS)
        assert path is not None  # `is_heading` has found it
        self._path, self._label = path, self._find(LABELS)
        self._start, self._end = self._find(STARTS), self._find(ENDS)
        if (self._start is None) != (self._end is None):
            raise ValueError(f"names only one of start and end. {EXPECTED}")
        if self._start is None and any(re.match("(start|end)", name) for name in self.columns):
            raise ValueError("names limits of segments that are not `start` and `end`, in seconds")
        self.named = False
        """Whether labels are names of classes."""

    @staticmethod
    def is_heading(line: str) -> bool:
        """Whether a line names columns: one of them that of the path, and none is a number or has a suffix."""
        names = [_unquoted(name.strip()).lower() for name in re.split(r"[,;\t ]", line)]
        is_data = any(name.isdigit() or re.search(r"[./\\]", name) for name in names)
        return not is_data and not {"youtube_id", *PATHS}.isdisjoint(names)

    @property
    def is_plain(self) -> bool:
        """Whether the heading only names what a line without one has, `path` or `path label`."""
        only_these = self.columns[1:] == [] or (self._label == 1 and self.columns[2:] == [])
        return self.delimiter == " " and self._path == 0 and only_these

    def parse(self, line: str) -> Entry:
        fields = self._fields(line)
        if len(fields) != len(self.columns):
            raise ValueError(f"has {len(fields)} columns, the heading {len(self.columns)}")
        label: int | str = NO_LABEL
        if self._label is not None:
            label = fields[self._label]
            if not self.named and _LABEL.fullmatch(label):
                label = int(label)
            elif not self.named or _is_no_class(label):
                raise ValueError(
                    f"has the label '{label}'; expected an integer from 0, or the name of a class in all lines"
                )
        segment = ""
        if self._start is not None and self._end is not None:
            try:
                limits = float(fields[self._start]), float(fields[self._end])
            except ValueError:
                raise ValueError("has a start or end that is no number of seconds") from None
            try:
                segment = fragment(*limits)
            except ValueError as error:
                raise ValueError(f"has {error}") from None
        return Entry(fields[self._path], label, segment)

    def choose(self, lines: Sequence[str]) -> None:
        """Decide from some lines whether labels are numbers or names.

        Raises:
            ValueError: The lines are of several parts of a data set, such as training and validation.
        """
        rows = [fields for fields in map(self._fields, lines) if len(fields) == len(self.columns)]
        if self._label is not None:
            self.named = not any(_NUMBER.fullmatch(fields[self._label]) for fields in rows)
        split = self._find(SPLITS)
        parts = [] if split is None else sorted({fields[split] for fields in rows})
        if split is not None and len(parts) > 1:
            raise ValueError(
                f"has a column '{self.columns[split]}', and lines of {' and '.join(map(repr, parts[:4]))}; write a "
                "list for each"
            )

    def _fields(self, line: str) -> list[str]:
        fields = next(csv.reader([line], delimiter=self.delimiter, skipinitialspace=True))
        return [field.strip() for field in fields]

    def _find(self, names: Sequence[str]) -> int | None:
        return next((self.columns.index(name) for name in names if name in self.columns), None)


def form_of(lines: Sequence[str], is_file: bool) -> Form:
    """Return the form of a list without a heading.

    Args:
        lines: Some of its lines.
        is_file: Whether the first of them as a whole is the name of a file.
    """
    if any(parse_line(line)[1] != NO_LABEL for line in lines):
        return Plain(labeled=True)
    matches = [_NAMED.fullmatch(line) for line in lines]
    if not is_file and all(match and not _is_no_class(_unquoted(match["label"])) for match in matches):
        return Named()
    return Plain(labeled=False)


def parse_line(line: str) -> tuple[str, int]:
    """Parse a line `path label` to (path, label); `NO_LABEL` if it does not end in an integer."""
    labeled = _LABELED.fullmatch(line)
    match = labeled or _UNLABELED.fullmatch(line)
    assert match is not None
    return _name(match), int(labeled["label"]) if labeled else NO_LABEL


def without_numbers(name: str) -> str | None:
    """Return a name without the numbers at its end; None if there are none."""
    match = re.fullmatch(rf"(.+?)(?:{_SEPARATOR}\d+(?:\.\d+)?)+", name)
    return match[1] if match else None


def _name(match: re.Match[str]) -> str:
    if match["double"] is not None:
        return match["double"].replace('""', '"')
    return match["single"] if match["single"] is not None else match["bare"]


def _unquoted(text: str) -> str:
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1].replace('""', '"')
    return text


def _is_no_class(label: str) -> bool:
    label = label.strip(" ,;\t")  # of a line that ends in a separator
    return not label or _NUMBER.fullmatch(label) is not None or _FILE.fullmatch(label) is not None
