"""Pieces of a report's HTML."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from tubelet.report import figures


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption; `png` is None where it could not be made, and `caption` then says why."""

    name: str
    caption: str
    png: bytes | None


def save(folder: Path, name: str, caption: str, picture: Figure | Image.Image) -> Picture:
    """Write the picture to `report/<name>.png` of the folder."""
    png = figures.to_png(picture)
    path = folder / "report" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png)
    return Picture(name, caption, png)


def figure(picture: Picture) -> str:
    if picture.png is None:
        return f'<p class="missing">{escape(picture.caption)}</p>'
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{escape(picture.name)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts; the first row has the titles of the columns, the first column those of the rows."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows[1:]
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def bullets(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"


def details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def escape(text: str) -> str:
    return html.escape(str(text))
