"""Clips of video files: V-JEPA's VideoDataset."""

import os
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch

from tubelet.data import BadFile, DataConfig, Draw, Sample, VideoError
from tubelet.data.clip_sampling import clip_length, sample_frames
from tubelet.data.decoders import Video, open_video, read_frames
from tubelet.data.frame_cache import CachedVideo
from tubelet.data.randomness import Purpose, generator
from tubelet.data.sources import VIDEO_SUFFIXES, Source, read_source
from tubelet.data.worker_monitor import reading

ATTEMPTS = 10  # other videos tried for one draw before training gives up: then it is the set that is broken

Transform = Callable[[np.ndarray, np.random.Generator], torch.Tensor]


class Dataset:
    """`dataset[draw]` -> Sample, a pure function of seed and draw.

    transform: (frames uint8 [T, H, W, 3], rng) -> uint8 [views, 3, T, h, w].
    on_error: what becomes of a video that cannot be used. "replace": another one of the same source takes its place,
    and Sample.bad tells; "raise": VideoError; "exclude": an empty Sample whose `bad` tells.

    paths, labels (-1: none): of every sample. classes: the labels' names, where the files tell. sizes: number of
    samples of each entry of `data.datasets`. refused: index -> reason of videos that may not be opened any more,
    because they crashed or blocked a worker; the loader adds to it.
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
        self.classes: list[str] = []
        self.refused: dict[int, str] = {}
        sources = [self._read_source(entry) for entry in data.datasets]
        self.sizes = [len(source.paths) for source in sources]
        self.paths = [path for source in sources for path in source.paths]
        self.labels = [label for source in sources for label in source.labels]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: Draw) -> Sample:
        bad: list[BadFile] = []
        for index in self._candidates(draw):
            try:
                return self._read(index, draw.epoch, bad)
            except VideoError as error:
                if self.on_error == "raise":
                    raise
                bad.append(BadFile(error.path, error.reason, error.filtered))
        if self.on_error == "exclude":
            return self._empty(draw.index, bad)
        listed = "".join(f"\n  {file.path}: {file.reason}" for file in bad)
        raise VideoError(self.paths[draw.index], f"neither it nor others in its place can be used:{listed}")

    def _candidates(self, draw: Draw) -> Iterator[int]:
        """The sample drawn, then, in training, others at random: of its source first, then of all."""
        yield draw.index
        if self.on_error != "replace":
            return
        ends = np.cumsum(self.sizes)
        source = np.searchsorted(ends, draw.index, side="right")
        rng = generator(self.seed, Purpose.REPLACEMENT, draw.epoch, draw.index)
        own = rng.integers(ends[source] - self.sizes[source], ends[source], size=ATTEMPTS // 2)
        others = rng.integers(len(self), size=ATTEMPTS - ATTEMPTS // 2)
        tried = {draw.index}
        for index in np.concatenate([own, others]).tolist():
            if index not in tried:
                tried.add(index)
                yield index

    def _read(self, index: int, epoch: int, bad: list[BadFile]) -> Sample:
        path = self.paths[index]
        if index in self.refused:
            raise VideoError(path, self.refused[index])
        rng = generator(self.seed, Purpose.CLIP, epoch, index)
        with reading(index):
            clips, numbers = self._clips(path, rng)
        return Sample(clips, self.labels[index], index, path, torch.from_numpy(numbers), tuple(bad))

    def _read_source(self, entry: str) -> Source:
        return read_source(entry, VIDEO_SUFFIXES)

    def _clips(self, path: str, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
        """Clips uint8 [num_clips · views, 3, T, h, w] of a file and their frames' numbers [num_clips, T]."""
        video = self._open(path)
        window = clip_length(self.data, video.fps)
        if self.data.filter_short_videos and video.num_frames < window:
            reason = f"{video.num_frames} frames, fewer than the {window} of a clip (filter_short_videos)"
            raise VideoError(path, reason, filtered=True)
        numbers = sample_frames(video.num_frames, video.fps, self.data, rng)
        frames = read_frames(video, numbers.reshape(-1), path)
        return torch.cat([self.transform(clip, rng) for clip in np.split(frames, self.data.num_clips)]), numbers

    def _open(self, path: str) -> Video:
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise VideoError(path, error.strerror) from error
        if size > self.data.filter_long_videos:
            reason = f"{size} bytes, more than filter_long_videos {self.data.filter_long_videos}"
            raise VideoError(path, reason, filtered=True)
        if self.data.cache is None:
            return open_video(path, self.data.decoder)
        return CachedVideo(path, self.data.decoder, self.data.cache)

    def _empty(self, index: int, bad: list[BadFile]) -> Sample:
        return Sample(
            clips=torch.empty(0, dtype=torch.uint8),
            label=self.labels[index],
            index=index,
            path=self.paths[index],
            frames=torch.empty(0, dtype=torch.int64),
            bad=tuple(bad),
        )
