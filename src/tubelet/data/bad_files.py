"""Unreadable videos met in training: counted, listed once in a file, and an error where there are too many."""

import logging
from collections.abc import Iterable
from pathlib import Path

from tubelet.config import UserError
from tubelet.data.types import BadFile, Batch
from tubelet.runtime.distributed import World

logger = logging.getLogger(__name__)

MIN_DRAWS = 100
"""Draws before the fraction of bad ones is checked; with fewer, a single file would exceed it."""
MAX_LISTED = 50
"""Files named in the error message."""


class TooManyBadFiles(UserError):
    """More than `data.max_bad_fraction` of the draws met an unreadable video. The message lists the files."""


class BadFiles:
    """Counts the videos that batches report as bad, and lists each file once in `path` as `path<tab>reason`.

    Only rank 0 writes and warns: at once about its own files, in `sync` about those of the other processes. Files
    excluded by an option (`filter_short_videos`, `filter_long_videos`) are listed, but not counted.

    Args:
        path: The list; files that it already names are not listed again.
        max_fraction: Largest fraction of draws that may meet an unreadable video.
        world: The processes of the run.
    """

    def __init__(self, path: str | Path, max_fraction: float, world: World | None = None):
        self.path, self.max_fraction, self.world = Path(path), max_fraction, world or World()
        self.num_draws = self.num_bad = 0
        """Of this process."""
        self._listed: dict[str, str] = self._read()
        self._unsynced: list[BadFile] = []

    def record(self, batch: Batch) -> None:
        """Count a batch of this process."""
        num_bad = sum(not file.filtered for file in batch.bad)
        self.num_bad += num_bad
        self.num_draws += len(batch) + num_bad
        self._unsynced += [file for file in batch.bad if file.path not in self._listed]
        if self.world.is_main:
            self._list(batch.bad)

    def sync(self) -> None:
        """List the files of all processes, and check the fraction of bad draws. Called by all processes together.

        Raises:
            TooManyBadFiles: In all processes.
        """
        gathered = self.world.all_gather_object((self.num_draws, self.num_bad, self._unsynced))
        draws, bad, files = zip(*gathered, strict=True)
        self._unsynced = []
        self._list([file for of_rank in files for file in of_rank])
        num_draws, num_bad = sum(draws), sum(bad)
        if num_draws >= MIN_DRAWS and num_bad > self.max_fraction * num_draws:
            listed = "".join(f"\n  {path}\t{reason}" for path, reason in list(self._listed.items())[:MAX_LISTED])
            raise TooManyBadFiles(
                f"{num_bad} of {num_draws} draws met an unreadable video, more than data.max_bad_fraction "
                f"{self.max_fraction}; repair or remove these files (full list: {self.path}):{listed}"
            )

    def _list(self, files: Iterable[BadFile]) -> None:
        lines = []
        for file in files:
            if file.path in self._listed:
                continue
            self._listed[file.path] = " ".join(file.reason.split())
            lines.append(f"{file.path}\t{self._listed[file.path]}\n")
            if self.world.is_main:
                logger.warning("skipped %s: %s (listed in %s)", file.path, file.reason, self.path)
        if lines and self.world.is_main:
            with self.path.open("a", encoding="utf-8", errors="surrogateescape") as text:
                text.writelines(lines)

    def _read(self) -> dict[str, str]:
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return {path: reason for path, _, reason in (line.partition("\t") for line in lines)}
