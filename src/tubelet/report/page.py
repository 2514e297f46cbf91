"""The report of a run folder: one self-contained HTML page, the same numbers as JSON, and the pictures as PNG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tubelet.config import ConfigError
from tubelet.data import VideoError
from tubelet.report import clips, figures, study_file, study_page
from tubelet.report.curves import Curves, figures_of, loss_curves
from tubelet.report.html_parts import Picture, document, escape, figure, save
from tubelet.report.run_config import has_masks, objective_curves, read_config
from tubelet.runtime.checkpoint import CheckpointError
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.run_folder import read_log

MASKS_CAPTION = (
    "Frames of each clip (the first of each time slot), and the same frames under each mask of the configuration: "
    "unchanged = context, the input of the encoder; orange = target; dark = neither, dropped so that all clips of a "
    "batch keep the same number of tokens. Look for: target regions that hide entire objects in all frames, so that "
    "neighboring pixels or frames do not give the answer away."
)
FEATURES_CAPTION = (
    "Features of the encoder at each token, projected onto the first three principal components of all tokens of the "
    "clips, drawn as red, green and blue. Look for: colors that follow objects, parts or motion and that agree between "
    "clips. Colors that depend on the position in the frame only, or a single color, mean that the features encode "
    "little more than the position."
)


def write(folder: Path) -> Path:
    """See `tubelet.report.write`."""
    report = study_file.read(folder)
    title = report.get("title", folder.name)
    sections = study_page.sections(folder, report)
    if (config := read_config(folder)) is not None:
        log = read_log(folder)
        curves = objective_curves(config)
        curves = figures_of((loss_curves(log),) if curves is None else curves, log)
        report |= {"pretraining": summary(log, curves), "pretraining_settings": config}
        sections += _training_sections(folder, config, log, curves, report["pretraining"])
    sections += [*_time_section(report.get("seconds", {})), "<h2>Configuration</h2>", *_settings(report)]
    write_json(folder / "report.json", report)
    write_atomic(folder / "report.html", document(title, sections))
    return folder / "report.html"


def summary(log: list[dict[str, Any]], curves: Sequence[Curves]) -> dict[str, Any]:
    """Return the number of steps, the seconds of training, and the last value and a subsampled curve of each metric."""
    if not log:
        return {"steps": 0}
    names = [name for each in curves for name in each.names]
    lines = {name: figures.subsample(*figures.series(log, name), max_points=100) for name in names}
    rounded = {name: [np.round(axis, 5).tolist() for axis in line] for name, line in lines.items() if len(line[0])}
    seconds = sum(line.get("step_seconds") or 0.0 for line in log)
    last = {name: line[1][-1] for name, line in rounded.items()}
    events = [
        {"step": line["step"], "name": name, "message": message}
        for line in log
        for name, message in line.get("events", {}).items()
    ]
    steps = int(log[-1]["step"])
    return {"steps": steps, "seconds": round(seconds, 1), "last": last, "events": events, "curves": rounded}


# Pictures -------------------------------------------------------------------------------------------------------


def _curve_pictures(folder: Path, log: list[dict[str, Any]], curves: Sequence[Curves]) -> list[Picture]:
    pictures = []
    for each in curves:
        drawn = figures.draw_curves(log, each)
        if drawn is None:
            caption = f"{each.title}: no figure, as the log of this run has no {', '.join(each.names)}."
            pictures.append(Picture(each.key, caption, None))
        else:
            pictures.append(save(folder, each.key, each.caption, drawn))
    return pictures


def _clip_picture(folder: Path, name: str, caption: str, draw: Callable[[], Image.Image]) -> Picture:
    """Draw clips of the run; where its data or its checkpoints are gone, use the picture of an earlier report."""
    try:
        return save(folder, name, caption, draw())
    except (VideoError, ConfigError, CheckpointError) as error:
        reason = f"No new picture could be made: {error}."
    path = folder / "report" / f"{name}.png"
    if path.is_file():
        return Picture(name, f"{caption} (This is the picture of an earlier report. {reason})", path.read_bytes())
    return Picture(name, reason, None)


# Sections -------------------------------------------------------------------------------------------------------


def _training_sections(
    folder: Path, config: dict[str, Any], log: list[dict[str, Any]], curves: Sequence[Curves], numbers: dict[str, Any]
) -> list[str]:
    pictures = _curve_pictures(folder, log, curves)
    sections = [
        "<h2>Training</h2>",
        f"<p>{escape(_training_summary(numbers))}</p>",
        *(f'<p class="verdict">{escape(event["message"])}</p>' for event in numbers.get("events", [])),
        '<div class="grid">' + "".join(figure(p) for p in pictures if p.png) + "</div>",
        "".join(figure(p) for p in pictures if not p.png),
    ]
    if has_masks(config):
        picture = _clip_picture(folder, "masks", MASKS_CAPTION, lambda: clips.draw_masks(clips.read(folder, config)))
        sections += ["<h2>Masks</h2>", figure(picture)]
    picture = _clip_picture(
        folder, "features", FEATURES_CAPTION, lambda: clips.draw_features(*clips.read_features(folder, config))
    )
    return [*sections, "<h2>Features</h2>", figure(picture)]


def _training_summary(numbers: dict[str, Any]) -> str:
    if not numbers["steps"]:
        return "The log has no steps yet."
    minutes, seconds = divmod(round(numbers["seconds"]), 60)
    loss = numbers["last"].get("loss")
    text = f"{numbers['steps']} steps in {minutes} min {seconds} s of training"
    return f"{text}." if loss is None else f"{text}; mean loss at the end: {loss:.4f}."


def _time_section(seconds: dict[str, float]) -> list[str]:
    """Return the time of each stage of a study."""
    if not seconds:
        return []
    rows = "".join(
        f'<tr><th scope="row">{escape(stage)}</th><td>{value / 60:.1f} min</td></tr>'
        for stage, value in seconds.items()
    )
    caption = (
        "Sum over the processes of each stage, several of which ran at the same time. Feature extraction is part of "
        "the probes."
    )
    return ["<h2>Time</h2>", f"<p>{caption}</p><table><tbody>{rows}</tbody></table>"]


def _settings(report: dict[str, Any]) -> list[str]:
    training = {"Training": report["pretraining_settings"]} if "pretraining_settings" in report else {}
    texts = {
        title: yaml.safe_dump(value, sort_keys=False)
        for title, value in {**training, **report.get("settings", {})}.items()
    }
    return [
        f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        for title, text in texts.items()
    ]
