"""Several runs side by side on one page: results, differences of the configurations, curves."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError
from tubelet.report import figures
from tubelet.report.curves import Curves, figures_of, loss_curves
from tubelet.report.damage import read_mapping
from tubelet.report.html_parts import details, document, figure, save, table
from tubelet.report.run_config import objective_curves, read_config
from tubelet.runtime.files import write_atomic, write_json
from tubelet.runtime.run_folder import read_log

NAME = "comparison"
MISSING = "(no such option)"
NO_RESULT = "–"
GRID = re.compile(r"(^|[. ])(heads\.\d+|best_head)\.")
"""Keys of results.json that say something of single heads of a probe's grid, and which of them is the best."""
FACTS = re.compile(
    r"(^|[. ])((num_\w+|seed|global_batch|steps|train_seconds|queries|gallery)$|(seconds|lists|evaluation)\.)"
)
"""Keys of results.json that say how something was measured: seeds, sizes, durations."""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        name: Name on the page.
        folder: The folder.
        config: Its resolved configuration.
        log: Lines of log.jsonl; empty for a probe.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    log: list[dict[str, Any]]


def write(folders: Sequence[Path], out: Path) -> Path:
    """Write `comparison.html`, `comparison.json` and `report/*.png` to the folder `out`.

    Returns:
        The path of the page.

    Raises:
        ConfigError: One of `folders` is no run folder, is given twice, or has a damaged file, or `out` cannot be
            written.
    """
    runs = read(folders)
    differing, measured = differences(runs), results(runs)
    partial = {key: row for key, row in differing.items() if MISSING in row}
    changed = {key: row for key, row in differing.items() if key not in partial}
    of_heads = {key: row for key, row in measured.items() if GRID.search(key)}
    names = [run.name for run in runs]
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        drawn = list(pictures(runs, out))
    sections = [
        "<h2>Results</h2>",
        _table(names, {key: row for key, row in measured.items() if key not in of_heads}),
        *([details("Heads of the grid", _table(names, of_heads))] if of_heads else []),
        "<h2>Differences of the configurations</h2>",
        *([] if differing else ["<p>None but the folder.</p>"]),
        *([_table(names, changed)] if changed else []),
        *([details("Options of parts that not all runs have", _table(names, partial))] if partial else []),
        *(["<h2>Training</h2>", '<div class="grid">' + "".join(drawn) + "</div>"] if drawn else []),
    ]
    with _writing(out):
        write_json(out / f"{NAME}.json", {"runs": names, "results": measured, "differences": differing})
        write_atomic(out / f"{NAME}.html", document(" · ".join(names), sections))
    return out / f"{NAME}.html"


@contextlib.contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written: {error.strerror}") from None


def read(folders: Sequence[Path]) -> list[Run]:
    """Return the runs, each with the shortest end of its path that tells it from the others."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ConfigError("a folder is given twice; name each run once")
    runs = []
    for folder, name in zip(folders, _short_names([folder.resolve() for folder in folders]), strict=True):
        config = read_config(folder)
        if config is None:
            raise ConfigError(f"{folder} is not a run folder: it has no config.yaml")
        runs.append(Run(name, folder, config, read_log(folder)))
    return runs


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the options, but the folder, that are not the same in all runs: key -> value in each run."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for options in flat for key in options if key != "folder")
    rows = {key: [options.get(key, MISSING) for options in flat] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def results(runs: Sequence[Run]) -> dict[str, list[float | str]]:
    """Return the numbers of results.json in a run and its subfolders, and the last value of each metric in the log.

    What was measured comes first, then the values of the log, how it was measured, and the heads of a probe's grid.
    """
    rows: dict[str, list[float | str]] = {}
    for columns in ([_numbers(run.folder) for run in runs], [_last_values(run) for run in runs]):
        keys = dict.fromkeys(key for column in columns for key in column)
        rows |= {key: [column.get(key, NO_RESULT) for column in columns] for key in keys}
    return dict(sorted(rows.items(), key=lambda row: (bool(GRID.search(row[0])), bool(FACTS.search(row[0])))))


def _numbers(folder: Path) -> dict[str, float]:
    """Return the numbers of the files results.json, with the subfolder before the key."""
    found = {path.parent.name: read_mapping(path) for path in sorted(folder.glob("*/results.json"))}
    own = read_mapping(path) if (path := folder / "results.json").is_file() else {}
    # That of several probes has what is in the folders of its tasks and seeds.
    tasks, seeds = (content if isinstance(content := own.get(key), dict) else {} for key in ("tasks", "seeds"))
    repeated = {*tasks, *(f"seed-{seed}" for seed in seeds)}
    numbers = dict(_flat(own))
    for name, content in found.items():
        if name not in repeated:
            numbers |= {f"{name}: {key}": value for key, value in _flat(content)}
    return {
        key: value for key, value in numbers.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _last_values(run: Run) -> dict[str, float]:
    values: dict[str, float] = {"steps": run.log[-1]["step"]} if run.log else {}
    for curves in _curves(run):
        for name in curves.names:
            logged = figures.series(run.log, name)[1]
            if len(logged):
                values[f"{name}, last"] = round(float(logged[-1]), 6)
    return values


def pictures(runs: Sequence[Run], out: Path) -> Iterator[str]:
    """Yield a figure of each metric, with a curve of each run that has it."""
    metrics: dict[str, Curves] = {}
    for run in runs:
        for curves in _curves(run):
            for name, label in curves.names.items():
                title = curves.title if len(curves.names) == 1 else f"{curves.title}: {label}"
                metrics.setdefault(name, dataclasses.replace(curves, title=title))
    for name, curves in metrics.items():
        drawn = figures.draw_lines(curves, {run.name: figures.series(run.log, name) for run in runs})
        if drawn is not None:
            yield figure(save(out, f"{NAME}-{name}", f"{name} in log.jsonl", drawn))


def _curves(run: Run) -> list[Curves]:
    if not run.log:
        return []
    curves = objective_curves(run.config)
    return figures_of((loss_curves(run.log),) if curves is None else curves, run.log)


def _flat(node: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of each leaf; lists of plain values are one leaf."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{at}.{key}" if at else str(key))
    elif isinstance(node, list) and any(isinstance(value, Mapping) for value in node):
        for index, value in enumerate(node):
            yield from _flat(value, f"{at}.{index}")
    else:
        yield at, node


def _short_names(folders: Sequence[Path]) -> list[str]:
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _table(names: Sequence[str], rows: Mapping[str, Sequence[Any]]) -> str:
    return table([["", *names], *([key, *map(_text, row)] for key, row in rows.items())])


def _text(value: Any) -> str:
    if isinstance(value, float):
        if abs(value) >= 1e15:
            return f"{value:.4g}"
        if value.is_integer():
            return f"{value:.0f}"
        return f"{value:.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
