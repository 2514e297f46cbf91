"""The last line of a program: its result, and the files that it has written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tubelet.runtime.files import read_json

RESULTS, REPORT = "results.json", "report.html"
HEADLINES = ("top1", "accuracy", "exact_match", "text_to_video_r1", "sound_to_video_r1")
"""Keys of `results.json` in percent, of which the first that it has is shown."""


class Ending:
    """Describes what a program has done in its folder. Make it before the program starts."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files, self._checkpoints = self._written(), self._saved()

    def line(self) -> str | None:
        """Return e.g. `top1 16.7 % (attentive, lr 0.001); wrote runs/x/results.json`.

        It begins with "finished before" where there was nothing left to do, and is None for a program with neither
        `results.json` nor a report.
        """
        files = self._written()
        new = [name for name in files if files[name] != self._files.get(name)]
        results = RESULTS in files and (RESULTS in new or REPORT not in new)
        if not results and REPORT not in new:
            return None
        if results:
            parts = ["" if new else "finished before", headline(read_json(self.folder / RESULTS))]
        else:
            parts = ["finished before" if self._checkpoints and self._saved() == self._checkpoints else ""]
        paths = " and ".join(str(self.folder / name) for name in new or [RESULTS])
        return "; ".join(filter(None, [*parts, f"{'wrote' if new else 'see'} {paths}"]))

    def _written(self) -> dict[str, tuple[int, int]]:
        """Return what tells each file from the one that replaces it."""
        paths = [self.folder / RESULTS, *sorted(self.folder.glob("*.html"))]
        found = {path.name: path.stat() for path in paths if path.is_file()}
        return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}

    def _saved(self) -> set[Path]:
        """Return the checkpoints of the run and of its stages."""
        return {*self.folder.glob("checkpoints/*"), *self.folder.glob("*/checkpoints/*")}


def headline(results: Mapping[str, Any]) -> str:
    """Return the most important number of `results.json`, or that of each task; empty where it has none."""
    if tasks := results.get("tasks"):
        shown = [(name, _number(result)) for name, result in tasks.items()]
        return ", ".join(f"{name}: {text}" for name, text in shown if text)
    text, best = _number(results), results.get("best_head", {})
    settings = [f"{name} {value:g}" for name, value in best.items() if name in ("lr", "k")]
    how = ", ".join([*([results["head"]] if "head" in results else []), *settings])
    return f"{text} ({how})" if text and how else text


def _number(results: Mapping[str, Any]) -> str:
    key = next((key for key in HEADLINES if results.get(key) is not None), None)
    if key is None:
        return ""
    several = len(results.get("seeds", ())) > 1
    deviation = f" ± {results[f'{key}_std']:.1f}" if several else ""
    return f"{key} {results[key]:.1f}{deviation} %"
