"""Measurements and where they go: one JSON file and one Markdown table."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tubelet.runtime.files import write_atomic, write_json


@dataclass
class Record:
    """One measurement, a row of the table.

    Attributes:
        section: Name of the section that measured it.
        name: What was measured.
        milliseconds: Median time of a step or a call.
        first_milliseconds: Time of the first one, which includes compilation and planning.
        clips_per_second: Throughput.
        allocated_gib: Peak of the memory in use.
        reserved_gib: Peak of the memory that torch's allocator holds; the difference is fragmentation.
        share: Fraction of the measured rate of large matrix products.
        note: Further figures, or why there are none.
        details: Further figures for the JSON file.
    """

    section: str
    name: str
    milliseconds: float | None = None
    first_milliseconds: float | None = None
    clips_per_second: float | None = None
    allocated_gib: float | None = None
    reserved_gib: float | None = None
    share: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)


# Heading and format of each column of the table.
COLUMNS = {
    "section": ("section", "{}"),
    "name": ("measurement", "{}"),
    "milliseconds": ("ms", "{:.2f}"),
    "first_milliseconds": ("first, ms", "{:.0f}"),
    "clips_per_second": ("clips/s", "{:.1f}"),
    "allocated_gib": ("allocated, GiB", "{:.1f}"),
    "reserved_gib": ("reserved, GiB", "{:.1f}"),
    "share": ("share of matrix rate", "{:.0%}"),
    "note": ("note", "{}"),
}


def write(folder: Path, environment: dict[str, Any], records: Iterable[Record]) -> None:
    """Write `results.json` and `results.md` to the folder."""
    records = list(records)
    write_json(folder / "results.json", {"environment": environment, "records": [asdict(r) for r in records]})
    write_atomic(folder / "results.md", markdown(environment, records))


def markdown(environment: dict[str, Any], records: Iterable[Record]) -> str:
    """Format the environment as a list and the records as a table."""
    lines = ["# Measurements on a GPU", "", *(f"- {name}: {value}" for name, value in environment.items()), ""]
    lines += ["| " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |", "|---" * len(COLUMNS) + "|"]
    for record in records:
        lines.append("| " + " | ".join(_cell(getattr(record, key), form) for key, (_, form) in COLUMNS.items()) + " |")
    return "\n".join(lines) + "\n"


def append(path: Path, record: Record) -> None:
    """Append a record to a file of JSON lines, so that it survives the end of the process."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def read(path: Path) -> list[Record]:
    """Read the records that `append` wrote; a last line that is incomplete is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [Record(**json.loads(line)) for line in lines]


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value).replace("|", "\\|").replace("\n", " ")
