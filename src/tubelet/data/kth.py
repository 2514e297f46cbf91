"""KTH actions (Schüldt et al. 2004): six actions of 25 people, as AVI files and the list `00sequences.txt`.

Entries of `data.datasets` are the set's folder, with the files anywhere below it. `/data/kth:train` stands for persons
1 to 16 of it, `/data/kth:test` for 17 to 25, as in the literature on frame prediction, `/data/kth` for all. A sample is
one of the sequences that the list cuts each file into; its label is the place of its action in `ACTIONS`.
"""

import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tubelet.config import ConfigError
from tubelet.data import VideoError, video_dataset
from tubelet.data.decoders import Video
from tubelet.data.sources import Source

ACTIONS = ["boxing", "handclapping", "handwaving", "jogging", "running", "walking"]
PARTS = {"train": range(1, 17), "test": range(17, 26)}
LIST = "00sequences.txt"

_LINE = re.compile(r"(person(?P<person>\d\d)_(?P<action>[a-z]+)_d\d)\s+frames\s+(?P<ranges>[\d\s,-]+)")
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")


class Sequence(NamedTuple):
    """A line's part: frames `first` to `last` of a file, counted from 1, both included."""

    name: str
    person: int
    action: str
    first: int
    last: int


class Dataset(video_dataset.Dataset):
    """As `video_dataset.Dataset`; a sample's path is its file and frames, as in `person01_boxing_d1_uncomp.avi#1-95`.

    Sequences whose file is missing are left out with a warning. Raises ConfigError where all are, or the folder is not
    that set.
    """

    def _read_source(self, entry: str) -> Source:
        self.classes = ACTIONS
        name, _, part = entry.rpartition(":")
        folder, persons = (Path(name), PARTS[part]) if part in PARTS else (Path(entry), range(1, 26))
        folder = folder.expanduser()
        files = {path.name: path for path in sorted(folder.rglob("person*.avi"))}
        sequences = [s for s in read_list(folder) if s.person in persons]
        found = [(files[f"{s.name}_uncomp.avi"], s) for s in sequences if f"{s.name}_uncomp.avi" in files]
        if not found:
            raise ConfigError(
                f"data.datasets: '{entry}': none of the {len(sequences)} sequences in {LIST} has its file; unpack the "
                f"AVI files, such as {sequences[0].name}_uncomp.avi, anywhere below {folder}"
            )
        if len(found) < len(sequences):
            missing = sorted({s.name for s in sequences if f"{s.name}_uncomp.avi" not in files})
            warnings.warn(f"{folder}: {len(missing)} files of {LIST} are missing: {', '.join(missing)}", stacklevel=2)
        paths = [f"{path}#{s.first}-{s.last}" for path, s in found]
        return Source(paths, [ACTIONS.index(s.action) for _, s in found])

    def _open(self, path: str) -> Video:
        file, _, numbers = path.rpartition("#")
        first, last = map(int, numbers.split("-"))
        try:
            video = super()._open(file)
        except VideoError as error:  # of this sample: it goes by the name of its sequence
            raise VideoError(path, error.reason, error.filtered) from error
        # Some ranges of the published list end a little after their file.
        last = min(last, video.num_frames)
        if last < first:
            raise VideoError(path, f"the file has {video.num_frames} frames")
        return VideoPart(video, first - 1, last)


class VideoPart:
    """Frames `start` to `stop` - 1 of a video, as a `Video`."""

    def __init__(self, video: Video, start: int, stop: int):
        self._video, self._start = video, start
        self.num_frames, self.fps = stop - start, video.fps

    def frames_at(self, indices: np.ndarray) -> np.ndarray:
        return self._video.frames_at(indices + self._start)


def read_list(folder: Path) -> list[Sequence]:
    """The sequences of the list in `folder` or below it. Raises ConfigError where there is none or it is another."""
    lists = sorted(folder.rglob(LIST))
    if not lists:
        where = "does not exist" if not folder.is_dir() else f"holds no {LIST}"
        raise ConfigError(
            f"data.datasets: {folder} {where}; give the folder of KTH actions with {LIST} and the AVI files, "
            "as it is for all persons, or with :train or :test after it"
        )
    sequences = []
    for line in lists[0].read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.match(line.strip())
        if match is None:  # the heading, and `*missing*` in place of a file's frames
            continue
        if match["action"] not in ACTIONS:
            raise ConfigError(f"data.datasets: {lists[0]}: '{line.strip()}': no action of {', '.join(ACTIONS)}")
        for first, last in _RANGE.findall(match["ranges"]):
            sequences.append(Sequence(match[1], int(match["person"]), match["action"], int(first), int(last)))
    if not sequences:
        raise ConfigError(
            f"data.datasets: {lists[0]}: no line like `person01_boxing_d1  frames  1-95, 96-185, 186-245, 246-360`"
        )
    return sequences
