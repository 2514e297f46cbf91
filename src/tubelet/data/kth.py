"""KTH actions (Schüldt et al. 2004): six actions of 25 people, as AVI files and the list `00sequences.txt`.

Entries of `data.datasets` are the data set's folder, with the files at any depth: `/data/kth:train` selects persons 1
to 16, `/data/kth:test` persons 17 to 25, as in the literature on frame prediction, and `/data/kth` all. A sample is one
of the sequences into which the list divides each file; its label is the index of its action in `ACTIONS`.
"""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from tubelet.config import ConfigError
from tubelet.data import video_dataset
from tubelet.data.decoders import Video
from tubelet.data.segments import VideoPart
from tubelet.data.sources import Source
from tubelet.data.types import VideoError

logger = logging.getLogger(__name__)

ACTIONS = ["boxing", "handclapping", "handwaving", "jogging", "running", "walking"]
PARTS = {"train": range(1, 17), "test": range(17, 26)}
LIST = "00sequences.txt"

_LINE = re.compile(r"(person(?P<person>\d\d)_(?P<action>[a-z]+)_d\d)\s+frames\s+(?P<ranges>[\d\s,-]+)")
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


class Sequence(NamedTuple):
    """Frames `first` to `last` of a file, numbered from 1, inclusive."""

    name: str
    person: int
    action: str
    first: int
    last: int


class Dataset(video_dataset.Dataset):
    """Like `video_dataset.Dataset`; a sample's path is its file and frames: `person01_boxing_d1_uncomp.avi#1-95`.

    Sequences whose file is missing are skipped with a warning.

    Raises:
        ConfigError: All files are missing, or the folder holds another data set.
    """

    def find_samples(self, entry: str) -> Source:
        self.classes = ACTIONS
        name, _, part = entry.rpartition(":")
        folder, persons = (Path(name), PARTS[part]) if part in PARTS else (Path(entry), range(1, 26))
        folder = folder.expanduser()
        files = {path.name: path for path in sorted(folder.rglob("person*.avi"))}
        sequences = [s for s in read_list(folder) if s.person in persons]
        available = [(files[f"{s.name}_uncomp.avi"], s) for s in sequences if f"{s.name}_uncomp.avi" in files]
        if not available:
            raise ConfigError(
                f"data.datasets: '{entry}': the files of all {len(sequences)} sequences in {LIST} are missing; unpack "
                f"the AVI files, such as {sequences[0].name}_uncomp.avi, anywhere below {folder}"
            )
        if len(available) < len(sequences):
            missing = sorted({s.name for s in sequences if f"{s.name}_uncomp.avi" not in files})
            logger.warning("%s: %d files of %s are missing: %s", folder, len(missing), LIST, ", ".join(missing))
        paths = [f"{path}#{s.first}-{s.last}" for path, s in available]
        return Source(paths, [ACTIONS.index(s.action) for _, s in available])

    def open(self, path: str) -> Video:
        file, _, numbers = path.rpartition("#")
        first, last = map(int, numbers.split("-"))
        try:
            video = super().open(file)
        except VideoError as error:  # of the file; name the sample
            raise VideoError(path, error.reason, error.filtered) from error
        # Some ranges of the published list exceed their file by a few frames.
        last = min(last, video.num_frames)
        if last < first:
            raise VideoError(path, f"the file has {video.num_frames} frames")
        return VideoPart(video, first - 1, last)


def read_list(folder: Path) -> list[Sequence]:
    """The sequences of the list in `folder` or below it.

    Raises:
        ConfigError: There is no list, or it is not that of KTH actions.
    """
    lists = sorted(folder.rglob(LIST))
    if not lists:
        where = "does not exist" if not folder.is_dir() else f"holds no {LIST}"
        raise ConfigError(
            f"data.datasets: {folder} {where}; give the folder of KTH actions with {LIST} and the AVI files, "
            "alone for all persons, or followed by :train or :test"
        )
    sequences = []
    for line in lists[0].read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.match(line.strip())
        if match is None:  # the heading, or `*missing*` instead of frames
            continue
        if match["action"] not in ACTIONS:
            raise ConfigError(
                f"data.datasets: {lists[0]}: '{line.strip()}': unknown action; expected one of {', '.join(ACTIONS)}"
            )
        for first, last in _RANGE.findall(match["ranges"]):
            sequences.append(Sequence(match[1], int(match["person"]), match["action"], int(first), int(last)))
    if not sequences:
        raise ConfigError(
            f"data.datasets: {lists[0]}: no line like `person01_boxing_d1  frames  1-95, 96-185, 186-245, 246-360`"
        )
    return sequences
