"""Pieces of a report's HTML."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from tubelet.report import figures

WIDE = 1000
"""Pixels; wider plots are not scaled down to the width of a phone, but scroll."""


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption; `png` is None where it could not be made, and `caption` then says why.

    A `plot` is dark on white, and is inverted where the page is dark.
    """

    name: str
    caption: str
    png: bytes | None
    plot: bool = False


def save(folder: Path, name: str, caption: str, picture: Figure | Image.Image) -> Picture:
    """Write the picture to `report/<name>.png` of the folder."""
    png = figures.to_png(picture)
    path = folder / "report" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png)
    return Picture(name, caption, png, plot=isinstance(picture, Figure))


def figure(picture: Picture) -> str:
    if picture.png is None:
        return f'<p class="missing">{escape(picture.caption)}</p>'
    data = base64.b64encode(picture.png).decode()
    wide = " wide" if int.from_bytes(picture.png[16:20], "big") > WIDE else ""  # the width in the header of a PNG
    plot = f' class="plot{wide}"' if picture.plot else ""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure><img{plot} alt="{escape(picture.name)}" src="data:image/png;base64,{data}">{caption}</figure>'


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


def document(title: str, sections: Sequence[str]) -> str:
    """Return the page as HTML that refers to no other file."""
    name = escape(title)
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Tubelet: {name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><main>\n<h1>{name}</h1>\n{body}\n</main></body></html>\n"
    )


STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --around: #f6f7f8; --text: #222; --faint: #555; --line: #e4e6e8; --rule: #444; --mark: #fff3e8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141414; --around: #0b0b0b; --text: #e2e2e2; --faint: #a8a8a8; --line: #303030; --rule: #999;
    --mark: #33251a;
  }
  img.plot { filter: invert(.92) hue-rotate(180deg); }
}
body { margin: 0; background: var(--around); color: var(--text); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem clamp(1rem, 4vw, 1.5rem) 4rem; background: var(--page); }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; overflow-wrap: anywhere; } h2 { margin: 2.6rem 0 .8rem; font-size: 1.25rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th[scope=row], th:first-child {
  text-align: left; font-weight: normal; white-space: normal; min-width: 8rem; overflow-wrap: anywhere;
}
thead th { border-bottom: 2px solid var(--rule); font-weight: 600; }
th[scope=colgroup] { text-align: center; border-bottom: 1px solid var(--rule); }
tr.pretrained { background: var(--mark); } tr.baseline { color: var(--faint); } td.best { font-weight: 700; }
.scroll { overflow-x: auto; margin: .8rem 0; } .verdict { border-left: 4px solid #e0661c; padding-left: .9rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: 1rem 2rem; }
figure { margin: 1rem 0; overflow-x: auto; }
img { max-width: 100%; height: auto; } .grid img { width: 100%; } img.wide { min-width: 45rem; }
figcaption, .missing { color: var(--faint); font-size: .88rem; max-width: 60rem; }
details { margin: .8rem 0; } summary { cursor: pointer; }
pre { background: var(--around); padding: 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
ul { padding-left: 1.2rem; color: var(--faint); font-size: .92rem; }
"""
