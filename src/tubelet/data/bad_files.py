"""What could not be read in training: counted, listed in a file, warned about, and too much of it ends the run."""

import warnings
from pathlib import Path

from tubelet.config import UserError
from tubelet.data import BadFile, Batch

MIN_DRAWS = 100  # draws before the share of bad ones is judged; earlier, one file would be too much


class TooManyBadFiles(UserError):
    """More than `data.max_bad_share` of the draws met an unreadable video; the message lists the files."""


class BadFiles:
    """Counts the videos that batches report as bad, and appends each file once to `path` as `path<tab>reason`.

    Files left out on the user's wish (filter_short_videos, filter_long_videos) are listed, but not counted.
    """

    def __init__(self, path: str | Path, max_share: float):
        self.path, self.max_share = Path(path), max_share
        self.draws = self.bad_draws = 0
        self._listed = {line.split("\t")[0] for line in self._lines()}

    def record(self, batch: Batch) -> list[BadFile]:
        """Takes a batch into account; returns the files seen bad for the first time, after a warning about each."""
        new = []
        for file in batch.bad:
            if file.path not in self._listed:
                self._listed.add(file.path)
                new.append(file)
                warnings.warn(f"left out {file.path}: {file.reason} (listed in {self.path})", stacklevel=2)
        if new:
            with self.path.open("a", encoding="utf-8", errors="surrogateescape") as lines:
                lines.writelines(f"{file.path}\t{' '.join(file.reason.split())}\n" for file in new)
        broken = sum(not file.filtered for file in batch.bad)
        self.bad_draws += broken
        self.draws += len(batch) + broken
        return new

    def judge(self, draws: int, bad_draws: int) -> None:
        """Raises TooManyBadFiles with the list where more than `max_share` of the draws of all processes were bad."""
        if draws >= MIN_DRAWS and bad_draws > self.max_share * draws:
            listed = "".join(f"\n  {line}" for line in self._lines()[:50])
            raise TooManyBadFiles(
                f"{bad_draws} of {draws} draws met an unreadable video, more than data.max_bad_share "
                f"{self.max_share}; repair or remove these files (all of them in {self.path}):{listed}"
            )

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
