"""The report of a run folder: one self-contained HTML page, the same numbers as JSON, the pictures as PNG."""

import base64
import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure
from PIL import Image

from tubelet.config import ConfigError
from tubelet.data import VideoError
from tubelet.report import aggregate, clips, figures
from tubelet.runtime.checkpoint import CheckpointError
from tubelet.runtime.run_folder import read_log, write_atomic

STUDY = "study.json"  # the tables of a study, written by the program that ran it

MASKS_CAPTION = (
    "Each clip's frames (the first of each time slot), and below them what a mask of the configuration does to its "
    "tokens: as it is = context, which the encoder sees; orange = target, whose features are predicted; dark = "
    "neither, left out so that all clips of a batch keep equally many tokens. Look for: target regions that hide "
    "whole objects through all frames, so that neighbouring pixels or frames do not give the answer away."
)
FEATURES_CAPTION = (
    "The target encoder's features at every token, projected onto the first three principal components of all tokens "
    "of the three clips; the components are red, green and blue. Look for: colours that follow objects, parts or "
    "motion and that agree between clips. Colours that only follow the place in the frame, or one flat colour, mean "
    "that the features carry the position and little else."
)


@dataclass(frozen=True)
class Picture:
    """A PNG with what to look for in it; `png` is None where it could not be made, and `caption` then says why."""

    name: str
    caption: str
    png: bytes | None


def write(folder: Path) -> Path:
    """See `tubelet.report.write`."""
    study = _read_study(folder)
    pictures = {"table": _table_picture(folder, study)}
    report = study
    if (folder / "config.yaml").is_file():  # else a study without pretraining
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        log = read_log(folder)
        pictures["curves"] = [_curves(folder, log, each) for each in figures.CURVES]
        pictures["clips"] = _clip_pictures(folder, config)
        report = {**study, "pretraining": summary(log), "pretraining_settings": config}
    write_atomic(folder / "report.json", json.dumps(report, indent=1))
    write_atomic(folder / "report.html", render(study.get("title", folder.name), report, pictures))
    return folder / "report.html"


def summary(log: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers behind the curves: steps, seconds, last values, and each curve thinned out."""
    if not log:
        return {"steps": 0}
    names = [name for curves in figures.CURVES for name in curves.names]
    found = {name: figures.thinned(*figures.series(log, name), most=100) for name in names}
    rounded = {name: [np.round(axis, 5).tolist() for axis in line] for name, line in found.items() if len(line[0])}
    seconds = sum(line.get("step_seconds") or 0.0 for line in log)
    last = {name: line[1][-1] for name, line in rounded.items()}
    return {"steps": int(log[-1]["step"]), "seconds": round(seconds, 1), "last": last, "curves": rounded}


def _read_study(folder: Path) -> dict[str, Any]:
    path = folder / STUDY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _table_picture(folder: Path, study: dict[str, Any]) -> list[Picture]:
    lines = aggregate.rows_of(study)
    if not lines:
        return []
    picture = figures.bars(study, lines, aggregate.tasks_of(study))
    caption = (
        "The same numbers as bars, with one standard deviation. Look for: orange, the pretrained encoder, well to the "
        "right of the random one, by more than the whiskers; and right of the floors, which see no motion (one frame) "
        "or no content (differences)."
    )
    return [_keep(folder, "table", caption, picture)]


def _curves(folder: Path, log: list[dict[str, Any]], curves: figures.Curves) -> Picture:
    figure = figures.draw_curves(log, curves)
    if figure is None:
        missing = f"{curves.title}: the log of this run has no {', '.join(curves.names)}, so there is no curve."
        return Picture(curves.key, missing, None)
    return _keep(folder, curves.key, curves.caption, figure)


def _clip_pictures(folder: Path, config: dict[str, Any]) -> list[Picture]:
    """Masks and features; where the run's data are gone, the pictures of an earlier report."""
    drawings: dict[str, tuple[str, Callable[[], Image.Image]]] = {
        "masks": (MASKS_CAPTION, lambda: clips.draw_masks(clips.read(folder, config))),
        "features": (FEATURES_CAPTION, lambda: clips.draw_features(*clips.read_features(folder, config))),
    }
    pictures = []
    for name, (caption, draw) in drawings.items():
        try:
            pictures.append(_keep(folder, name, caption, draw()))
        except (VideoError, ConfigError, CheckpointError) as error:
            pictures.append(_earlier(folder, name, caption, f"No new picture could be made: {error}."))
    return pictures


def _keep(folder: Path, name: str, caption: str, picture: Figure | Image.Image) -> Picture:
    png = figures.to_png(picture)
    path = folder / "report" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png)
    return Picture(name, caption, png)


def _earlier(folder: Path, name: str, caption: str, why: str) -> Picture:
    path = folder / "report" / f"{name}.png"
    if path.is_file():
        return Picture(name, f"{caption} (This is the picture of an earlier report. {why})", path.read_bytes())
    return Picture(name, why, None)


# The page ---------------------------------------------------------------------------------------------------------


def render(title: str, report: dict[str, Any], pictures: dict[str, list[Picture]]) -> str:
    """The page as HTML; everything is in it, nothing is fetched."""
    parts = [
        *_study_part(report, pictures["table"]),
        *(_pretraining_part(report, pictures) if "pretraining" in report else []),
        *_time_part(report.get("seconds", {})),
        "<h2>Settings</h2>",
        *_settings_part(report),
    ]
    body = "\n".join(parts)
    name = _escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Tubelet: {name}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n'
        f"<body><main>\n<h1>{name}</h1>\n{body}\n</main></body></html>\n"
    )


def _pretraining_part(report: dict[str, Any], pictures: dict[str, list[Picture]]) -> list[str]:
    return [
        "<h2>Pretraining</h2>",
        f"<p>{_escape(_sentence(report['pretraining']))}</p>",
        '<div class="grid">' + "".join(_figure(p) for p in pictures["curves"] if p.png) + "</div>",
        "".join(_figure(p) for p in pictures["curves"] if not p.png),
        "<h2>What is hidden and what is seen</h2>",
        _figure(pictures["clips"][0]),
        "<h2>What the features show</h2>",
        _figure(pictures["clips"][1]),
    ]


def _study_part(report: dict[str, Any], pictures: list[Picture]) -> list[str]:
    lines = aggregate.rows_of(report)
    if not lines:
        return []
    parts = ["<h2>Does pretraining help?</h2>"]
    parts += [f'<p class="verdict">{_escape(sentence)}</p>' for sentence in report.get("verdict", [])]
    parts += [_table(report, lines), _meanings([title for _, _, title in lines])]
    parts += ["<ul>" + "".join(f"<li>{_escape(note)}</li>" for note in report.get("notes", [])) + "</ul>"]
    parts += [_figure(picture) for picture in pictures]
    parts += _scales_part(report)
    return parts


def _table(report: dict[str, Any], lines: list[tuple[str, str, str]]) -> str:
    """The table of rows and tasks; the best of the frozen encoders stands out in each column."""
    tasks = aggregate.tasks_of(report)
    frozen = ("random", "random_best", "pretrained")
    best = {
        task: max((report[h][r][task][0] for h, r, _ in lines if r in frozen and task in report[h][r]), default=None)
        for task in tasks
    }
    rows = []
    for head, row, title in lines:
        cells = []
        for task in tasks:
            cell = report[head][row].get(task)
            bold = ' class="best"' if row in frozen and cell and cell[0] == best[task] else ""
            cells.append(f"<td{bold}>{_escape(aggregate.text_cell(cell))}</td>")
        kind = "pretrained" if row == "pretrained" else "floor" if row.startswith("floor") else ""
        rows.append(f'<tr class="{kind}"><th scope="row">{_escape(title)}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">{_escape(task.replace("_", " "))}</th>' for task in tasks)
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">top-1 accuracy in %, mean ± standard deviation</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _meanings(titles: list[str]) -> str:
    """What the rows that there are mean."""
    used = {words: text for words, text in aggregate.MEANING.items() if any(words in title for title in titles)}
    items = "".join(f"<li><b>{_escape(words)}</b>: {_escape(text)}.</li>" for words, text in used.items())
    return f"<details open><summary>What the rows mean</summary><ul>{items}</ul></details>"


def _scales_part(report: dict[str, Any]) -> list[str]:
    """Each initialisation scale of the random encoder."""
    tasks = aggregate.tasks_of(report)
    rows = []
    for head, scales in report.get("random_scales", {}).items():
        for std, cells in scales.items():
            numbers = "".join(f"<td>{_escape(aggregate.text_cell(cells.get(task)))}</td>" for task in tasks)
            title = f"{aggregate.HEADS[head]}, weights of standard deviation {std}"
            rows.append(f'<tr><th scope="row">{_escape(title)}</th>{numbers}</tr>')
    if not rows:
        return []
    heads = "".join(f'<th scope="col">{_escape(task.replace("_", " "))}</th>' for task in tasks)
    return [
        "<details><summary>The random encoder at each initialisation scale</summary>"
        f'<div class="scroll"><table><thead><tr><th scope="col">random encoder</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    ]


def _sentence(pretraining: dict[str, Any]) -> str:
    if not pretraining["steps"]:
        return "The log has no step yet."
    minutes, seconds = divmod(round(pretraining["seconds"]), 60)
    loss = pretraining["last"].get("loss")
    ended = f"; the last logged losses average {loss:.4f}" if loss is not None else ""
    return f"{pretraining['steps']} steps in {minutes} min {seconds} s of training{ended}."


def _time_part(seconds: dict[str, float]) -> list[str]:
    """Time of each stage."""
    if not seconds:
        return []
    rows = "".join(
        f'<tr><th scope="row">{_escape(stage)}</th><td>{value / 60:.1f} min</td></tr>'
        for stage, value in seconds.items()
    )
    caption = "Time of the processes, summed; several ran at once, and feature extraction counts with the probes."
    return ["<h2>Time</h2>", f"<p>{caption}</p><table><tbody>{rows}</tbody></table>"]


def _settings_part(report: dict[str, Any]) -> list[str]:
    own = {"Pretraining": report["pretraining_settings"]} if "pretraining_settings" in report else {}
    settings = {**own, **report.get("settings", {})}
    texts = {title: yaml.safe_dump(value, sort_keys=False) for title, value in settings.items()}
    return [
        f"<details><summary>{_escape(title)}</summary><pre>{_escape(text)}</pre></details>"
        for title, text in texts.items()
    ]


def _figure(picture: Picture) -> str:
    if picture.png is None:
        return f'<p class="missing">{_escape(picture.caption)}</p>'
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{_escape(picture.name)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{_escape(picture.caption)}</figcaption></figure>"
    )


def _escape(text: str) -> str:
    return html.escape(str(text))


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f8; color: #222; font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; background: #fff; }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; } h2 { margin: 2.6rem 0 .8rem; font-size: 1.25rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .8rem; border-bottom: 1px solid #e4e6e8; text-align: right; white-space: nowrap; }
th[scope=row], th:first-child { text-align: left; font-weight: normal; white-space: normal; }
thead th { border-bottom: 2px solid #444; font-weight: 600; }
tr.pretrained { background: #fff3e8; } tr.floor { color: #666; } td.best { font-weight: 700; }
.scroll { overflow-x: auto; } .verdict { border-left: 4px solid #e0661c; padding-left: .9rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem 2rem; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } .grid img { width: 100%; }
figcaption, .missing { color: #555; font-size: .88rem; max-width: 60rem; }
details { margin: .8rem 0; } summary { cursor: pointer; }
pre { background: #f6f7f8; padding: 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
ul { padding-left: 1.2rem; color: #444; font-size: .92rem; }
"""
