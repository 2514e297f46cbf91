"""Clips of video files: V-JEPA's VideoDataset, and the base class of other formats."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch
from torch import Tensor

from tubelet.config import ConfigError
from tubelet.data import storage
from tubelet.data.bad_files import NoReplacement
from tubelet.data.clip_sampling import clip_length, sample_frames
from tubelet.data.decoders import PathOrFile, Video, check_decoder, open_video, read_frames
from tubelet.data.frame_cache import CachedVideo
from tubelet.data.options import DataConfig
from tubelet.data.permutation import random_order
from tubelet.data.rows import Rows, join_numbers, join_strings
from tubelet.data.segments import part_of, split_segment
from tubelet.data.sources import VIDEO_SUFFIXES, Source, number_classes, read_source, renumbered
from tubelet.data.types import BadFile, Draw, Sample, VideoError
from tubelet.data.worker_monitor import reading
from tubelet.runtime.seeds import Purpose, numpy_generator

MIN_REPLACEMENTS = 10
IMPOSSIBLE = 1e-12
"""So many replacements are tried that, with at most `max_bad_fraction` bad files, all are bad with this probability."""
MAX_FILTERED = 1000
"""Replacements tried that are excluded by an option."""

Views = dict[str, Tensor]
Transform = Callable[[np.ndarray, np.random.Generator], Tensor | Views]


class Dataset:
    """`dataset[draw]` -> `Sample`, a pure function of the seed and the draw. See `tubelet.data` for other formats.

    Args:
        data: Section `data` of the configuration.
        transform: See `tubelet.data.transforms`.
        seed: Seed of clip positions, augmentations and replacements.
        on_error: What happens with a video that cannot be used. "replace": another one of the same source is read
            instead, and `Sample.bad` names it; "raise": VideoError; "exclude": the sample has no views, and its `bad`
            names the file.

    Attributes:
        paths: Path of each sample; a sequence, but no list (see `rows`).
        labels: Label of each sample, -1 if it has none; a sequence, but no list.
        classes: Names of the classes, where the format knows them.
        named_in_list: Whether lists name the class of each sample.
        sizes: Number of samples of each entry of `data.datasets`.
        cumulative_durations: With `data.weight_by_duration`, for each entry, the seconds of each sample and all before
            it.
        unreadable: index -> reason, of samples that must not be read again because they crashed or blocked a worker.
            The loader adds to it.
    """

    def __init__(
        self,
        data: DataConfig,
        transform: Transform,
        *,
        seed: int = 0,
        on_error: Literal["replace", "raise", "exclude"] = "raise",
    ):
        self.data, self.transform, self.seed, self.on_error = data, transform, seed, on_error
        check_decoder(data.decoder)
        self.classes: list[str] = []
        self.unreadable: dict[int, str] = {}
        self._unusable: dict[int, BadFile] = {}
        """Samples that were tried, of which no clip can be read; they are not opened again."""
        self._max_replacements = _max_replacements(data.max_bad_fraction)
        sources = [self.find_samples(entry) for entry in data.datasets]
        self.sizes = [len(source.paths) for source in sources]
        self.paths = join_strings([source.paths for source in sources])
        names, labels = number_classes(data.datasets, sources)
        self.named_in_list = bool(names)
        if names:
            self.classes = names
        self.labels = join_numbers(labels)
        self.cumulative_durations = self._durations(sources) if data.weight_by_duration else None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: Draw) -> Sample:
        bad: dict[int, BadFile] = {}
        for candidates in self._candidates(draw):
            failed = filtered = 0
            for index in candidates:
                if index in bad:
                    continue
                try:
                    return self._read(index, draw.epoch, bad.values())
                except VideoError as error:
                    if self.on_error == "raise":
                        raise
                    bad[index] = BadFile(error.path, error.reason, error.filtered)
                    if error.always:
                        self._unusable[index] = bad[index]
                failed, filtered = failed + (not bad[index].filtered), filtered + bad[index].filtered
                if failed >= self._max_replacements or filtered >= MAX_FILTERED:
                    break
        if self.on_error == "exclude":
            return self._excluded(draw.index, bad.values())
        raise NoReplacement(
            f"neither {storage.public(self.paths[draw.index])} nor {len(bad) - 1} other videos in its place can be "
            f"used, so more than data.max_bad_fraction {self.data.max_bad_fraction} of the files are unreadable, or "
            "data.filter_short_videos and filter_long_videos exclude nearly all; repair or remove these files, or "
            "change these options:",
            tuple(bad.values()),
        )

    def use_classes(self, classes: Sequence[str]) -> None:
        """Number the classes as in `classes`, which has all those of this data set."""
        if self.classes != list(classes):
            self.labels = renumbered(self.labels, self.classes, classes)
            self.classes = list(classes)

    def find_samples(self, entry: str) -> Source:
        """Return the samples of an entry of `data.datasets`, as paths and labels."""
        return read_source(entry, VIDEO_SUFFIXES, self.data.storage)

    def open(self, path: str) -> Video:
        """Open the video of a sample, or the part of it that the path selects; see `segments`.

        Raises:
            VideoError: It cannot be opened, or is excluded by an option.
        """
        file, segment = split_segment(path)
        source, status = self.locate(path)
        video = self.decode(file, source, status)
        return video if segment is None else part_of(video, segment, path)

    def locate(self, path: str) -> tuple[PathOrFile, storage.Status]:
        """Return what a decoder opens for the file of a sample, and the status of the file.

        Raises:
            VideoError: There is no such file, or it cannot be reached.
        """
        file, _ = split_segment(path)
        try:
            status = storage.status(file, self.data.storage)
        except OSError as error:
            raise VideoError(path, storage.reason(error)) from error
        if storage.is_remote(file):
            return cast(BinaryIO, storage.RemotePart(file, 0, status.size, self.data.storage)), status
        return storage.local_path(file), status

    def decode(self, path: str, source: PathOrFile, status: storage.Status) -> Video:
        """Return the video in `source`, through the cache of decoded videos if there is one; see `open`."""
        if status.size > self.data.filter_long_videos:
            reason = f"{status.size} bytes, more than filter_long_videos {self.data.filter_long_videos}"
            raise VideoError(path, reason, filtered=True)
        if self.data.cache is None:
            return open_video(source, self.data.decoder)
        return CachedVideo(path, self.data.decoder, self.data.cache, source, status)

    def read_views(self, path: str, rng: np.random.Generator) -> tuple[Views, np.ndarray]:
        """Read and transform the clips of a sample.

        Returns:
            The views, uint8 [n, C, T, H, W], and the numbers of the frames they show, int64 [num_clips, T].

        Raises:
            VideoError: The video cannot be used.
        """
        by_time = self.data.fps is not None or self.data.clip_duration is not None
        try:
            video = self.open(path)
            fps = video.fps if by_time else 1.0  # frames counted by `sampling_rate` do not depend on it
            window = clip_length(self.data, fps)
            if self.data.filter_short_videos and video.num_frames < window:
                reason = f"{video.num_frames} frames, fewer than the {window} of a clip (filter_short_videos)"
                raise VideoError(path, reason, filtered=True)
        except VideoError as error:
            # Errors of the system pass: a server that does not answer, no memory.
            error.always = not isinstance(error.__cause__, (OSError, MemoryError))
            raise
        numbers = sample_frames(video.num_frames, fps, self.data, rng, video.times if by_time else None)
        frames = read_frames(video, numbers.reshape(-1), path)
        return self.transformed(np.split(frames, self.data.num_clips), rng), numbers

    def transformed(self, clips: Sequence[np.ndarray], rng: np.random.Generator) -> Views:
        """Transform clips uint8 [T, H, W, 3]; return their views, concatenated in the order of the clips."""
        outputs = [self.transform(clip, rng) for clip in clips]
        views = [output if isinstance(output, dict) else {"clip": output} for output in outputs]
        return {name: torch.cat([view[name] for view in views]) for name in views[0]}

    def targets(self, index: int) -> dict[str, Any]:
        """Return `Sample.targets` of a sample."""
        return {"label": self.labels[index]}

    def _durations(self, sources: Sequence[Source]) -> list[Rows[float]]:
        known = [source.cumulative_durations for source in sources]
        for entry, durations in zip(self.data.datasets, known, strict=True):
            if durations is None:
                raise ConfigError(
                    f"data.weight_by_duration: '{entry}' has no durations; give an index, written by: "
                    f"tubelet index folder=runs/index "
                    f"data.datasets=[{entry}]"
                )
        return [durations for durations in known if durations is not None]

    def _candidates(self, draw: Draw) -> Iterator[Iterator[int]]:
        """Yield the sample drawn, then, in training, its replacements in random order: its source's first, then all.

        They do not depend on the samples known as unusable, so batches are the same with any number of workers.
        """
        yield iter([draw.index])
        if self.on_error != "replace":
            return
        ends = np.cumsum(self.sizes)
        source = np.searchsorted(ends, draw.index, side="right")
        of_source = range(int(ends[source] - self.sizes[source]), int(ends[source]))
        for number, samples in enumerate((of_source, range(len(self)))):
            order = random_order(len(samples), self.seed, Purpose.REPLACEMENT, draw.epoch, draw.index, number + 1)
            yield (samples[int(order[np.array([i])][0])] for i in range(len(samples)))

    def _read(self, index: int, epoch: int, bad: Iterable[BadFile]) -> Sample:
        path = self.paths[index]
        if index in self.unreadable:
            raise VideoError(path, self.unreadable[index])
        if known := self._unusable.get(index):
            raise VideoError(known.path, known.reason, known.filtered)
        rng = numpy_generator(self.seed, Purpose.CLIP, epoch, index)
        with reading(index):
            views, numbers = self.read_views(path, rng)
        numbers_read = torch.from_numpy(numbers)
        return Sample(views, self.targets(index), index, storage.public(path), numbers_read, tuple(bad))

    def _excluded(self, index: int, bad: Iterable[BadFile]) -> Sample:
        return Sample(
            views={},
            targets=self.targets(index),
            index=index,
            path=storage.public(self.paths[index]),
            frames=torch.empty(0, dtype=torch.int64),
            bad=tuple(bad),
        )


def _max_replacements(max_bad_fraction: float) -> float:
    """Bad files in a row that cannot be chance."""
    if max_bad_fraction == 1:
        return math.inf
    certain = math.ceil(math.log(IMPOSSIBLE) / math.log(max_bad_fraction)) if max_bad_fraction > 0 else 1
    return max(MIN_REPLACEMENTS, certain)
