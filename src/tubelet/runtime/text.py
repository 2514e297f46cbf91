"""Tables in plain text."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest


def text_table(rows: Iterable[Sequence[str]], header: Sequence[str] | None = None, *, align_right: bool = False) -> str:
    """Align cells in columns that are two spaces apart.

    Args:
        rows: Cells of each row. Rows may have different lengths. A row of a single cell is a heading: it may be wider
            than the first column.
        header: Column titles, separated from the rows by a rule.
        align_right: Align all columns but the first one to the right, e.g. for numbers.

    Example:
        >>> print(text_table([["a", "1.0"], ["bb", "10.0"]], ["name", "%"], align_right=True))
        name     %
        ----------
        a      1.0
        bb    10.0
    """
    rows = [list(row) for row in rows]
    if header is not None:
        rows.insert(0, list(header))
    columns = zip_longest(*(row for row in rows if len(row) > 1), fillvalue="")
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in rows:
        if len(row) == 1:
            lines.append(row[0])
            continue
        cells = [
            cell.rjust(width) if align_right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    if header is not None:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
