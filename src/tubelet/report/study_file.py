"""`study.json` of a folder: the results of a study, written by the program that ran it."""

import json
from pathlib import Path
from typing import Any

from tubelet.report.aggregate import BASELINE, FINE_TUNED
from tubelet.report.damage import read_mapping

NAME = "study.json"
OLD_HEADS = {"probe": "attentive", "linear": "linear"}
"""Before there were several objectives: name of a table -> head."""
OLD_PREFIXES = ("baseline_", "floor_")


def read(folder: Path) -> dict[str, Any]:
    """Return the content of the file, in today's form; empty where there is none.

    Returns:
        `title`, `settings`, `seconds` (stage -> sum over its jobs) and `datasets`: name -> `objectives`, `tasks`,
        `accuracy` and `random_scales` (see `aggregate.tables`), `curves`, `cost`, `verdict`, `notes`.

    Raises:
        ConfigError: The file is damaged. The message names it.
    """
    path = folder / NAME
    if not path.is_file():
        return {}
    study = read_mapping(path, lambda path: json.loads(path.read_text(encoding="utf-8")))  # NaN in those of 0.1
    return study if "datasets" in study else _from_one_objective(study, folder.name)


def _from_one_objective(study: dict[str, Any], name: str) -> dict[str, Any]:
    """Convert the form that had one objective, `pretrained`, and one data set."""
    accuracy: dict[str, Any] = {}
    for old, head in OLD_HEADS.items():
        for row, cells in study.get(old, {}).items():
            prefix = next((prefix for prefix in OLD_PREFIXES if row.startswith(prefix)), None)
            if prefix is not None:
                accuracy.setdefault(BASELINE, {})[row.removeprefix(prefix)] = cells
            else:
                accuracy.setdefault(FINE_TUNED if row == "supervised" else head, {})[row] = cells
    tasks = dict.fromkeys(task for rows in accuracy.values() for cells in rows.values() for task in cells)
    scales = study.get("random_scales", {})
    data = {
        "objectives": ["pretrained"],
        "tasks": list(tasks),
        "accuracy": accuracy,
        "random_scales": {head: scales[old] for old, head in OLD_HEADS.items() if scales.get(old)},
        "verdict": study.get("verdict", []),
        "notes": study.get("notes", []),
    }
    kept = {key: value for key, value in study.items() if key in ("title", "settings", "seconds")}
    return {**kept, "datasets": {name: data} if accuracy else {}}
