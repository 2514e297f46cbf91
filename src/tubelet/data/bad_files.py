"""Unreadable videos met in training: counted, listed once in a file, and an error where there are too many."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tubelet.config import UserError
from tubelet.data.types import BadFile, Batch
from tubelet.runtime.distributed import ONE_PROCESS, World

logger = logging.getLogger(__name__)

MIN_DRAWS = 100
"""Draws before the fraction of bad files is checked; with fewer, a single file would exceed it."""
MAX_LISTED = 50
"""Files named in the error message."""


class TooManyBadFiles(UserError):
    """More than `data.max_bad_fraction` of the videos are unreadable. The message lists them."""


class NoReplacement(TooManyBadFiles):
    """So many videos in a row are unreadable that more than `data.max_bad_fraction` of all must be.

    Unlike its base class it is raised in a single process, where a batch is made.

    Args:
        message: For the user; the list of files is appended.
        files: The files that were tried.
    """

    def __init__(self, message: str, files: tuple[BadFile, ...]):
        super().__init__(message, files)  # all as arguments, so that pickle can rebuild it
        self.message, self.files = message, files

    def __str__(self) -> str:
        return self.message + _listed((file.path, file.reason) for file in self.files)


class BadFiles:
    """Counts the videos that batches report as bad, and lists each file once in `path` as `path<tab>reason`.

    Only rank 0 writes and warns: at once about its own files, in `sync` about those of the other processes. Files
    excluded by an option (`filter_short_videos`, `filter_long_videos`) are listed, but not counted.

    Args:
        path: The list; files that it already names are not listed again.
        max_fraction: Largest fraction of the videos drawn that may be unreadable; each counts once.
        world: The processes of the run.
    """

    def __init__(self, path: str | Path, max_fraction: float, world: World = ONE_PROCESS):
        self.path, self.max_fraction, self.world = Path(path), max_fraction, world
        self.num_draws = 0
        """Of this process."""
        self._listed: dict[str, str] = self._read()
        self._bad: set[str] = set()
        self._read_once = np.zeros(0, dtype=bool)  # index of a sample -> whether it could be read
        self._unsynced: list[BadFile] = []
        self._unsynced_indices: list[np.ndarray] = []

    def record(self, batch: Batch) -> None:
        """Count a batch of this process."""
        self.num_draws += len(batch) + sum(not file.filtered for file in batch.bad)
        self._unsynced += [file for file in batch.bad if file.path not in self._bad]
        self._bad.update(file.path for file in batch.bad if not file.filtered)
        self._unsynced_indices.append(self._mark_read(batch.indices.cpu().numpy()))
        if self.world.is_main:
            self.add(batch.bad)

    def sync(self) -> None:
        """List the files of all processes, and check the fraction of bad ones. Called by all processes together.

        Raises:
            TooManyBadFiles: In all processes.
        """
        indices = np.concatenate([np.zeros(0, np.int64), *self._unsynced_indices])
        gathered = self.world.all_gather_object((self.num_draws, indices, self._unsynced))
        self._unsynced, self._unsynced_indices = [], []
        for _, of_rank, files in gathered:
            self._mark_read(of_rank)
            self._bad.update(file.path for file in files if not file.filtered)
            self.add(files)
        num_bad = len(self._bad)
        total = num_bad + int(self._read_once.sum())
        if sum(draws for draws, _, _ in gathered) >= MIN_DRAWS and num_bad > self.max_fraction * total:
            raise TooManyBadFiles(
                f"{num_bad} of the {total} videos drawn so far are unreadable, more than data.max_bad_fraction "
                f"{self.max_fraction}; repair or remove these files, or raise it (full list: {self.path}):"
                + _listed((path, reason) for path, reason in self._listed.items() if path in self._bad)
            )

    def add(self, files: Iterable[BadFile]) -> None:
        """Write files to the list that are not there yet, in the main process, and remember them."""
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

    def reasons(self) -> dict[str, str]:
        """Return the reason for each file that is listed, by path; complete in the main process, after `sync`."""
        return dict(sorted(self._listed.items()))

    def _mark_read(self, indices: np.ndarray) -> np.ndarray:
        """Return those of the samples that were not read before."""
        missing = int(indices.max(initial=-1)) + 1 - len(self._read_once)
        if missing > 0:
            self._read_once = np.append(self._read_once, np.zeros(max(missing, len(self._read_once)), dtype=bool))
        new = np.unique(indices[~self._read_once[indices]])
        self._read_once[new] = True
        return new

    def _read(self) -> dict[str, str]:
        if not self.path.exists():
            return {}
        lines = self.path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        return {path: reason for path, _, reason in (line.partition("\t") for line in lines)}


def _listed(files: Iterable[tuple[str, str]]) -> str:
    """The first files of a list, a line for each."""
    listed = [f"\n  {path}\t{' '.join(reason.split())}" for path, reason in files]
    more = [f"\n  and {len(listed) - MAX_LISTED} more"] if len(listed) > MAX_LISTED else []
    return "".join(listed[:MAX_LISTED] + more)
