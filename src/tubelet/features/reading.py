"""Clips of videos for an extraction, read by the workers of a loader."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tubelet.config import ConfigError, check
from tubelet.config.registry import find
from tubelet.data import DataConfig, VideoError, video_dataset
from tubelet.data.clip_sampling import clip_length, sample_frames
from tubelet.data.decoders import Video
from tubelet.data.transforms import EvalTransform
from tubelet.data.windows import read_clips, sliding_windows
from tubelet.data.worker_monitor import reading
from tubelet.data.workers import Loader
from tubelet.features.options import FeaturesDataConfig
from tubelet.probing.clips import clip_options
from tubelet.runtime.seeds import Purpose, numpy_generator

SEGMENT_BYTES = 2**27
"""Size of the clips that a worker decodes in one pass. A long video is decoded by several workers; each starts at the
key frame before its segment."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive clips of a video.

    Attributes:
        video: Index of the video.
        first, stop: Numbers of the first clip and of that after the last.
        clips: uint8 [n, 3, T, H, W].
        times: Start and end of each clip in seconds [n, 2]; None of images.
        error: Why the video cannot be read; there are no clips then.
    """

    video: int
    first: int
    stop: int
    clips: Tensor
    times: np.ndarray | None = None
    error: str | None = None


class ClipReader:
    """The clips of each video of a data set.

    Args:
        data: Section `data`.

    Attributes:
        dataset: The videos.

    Raises:
        ConfigError: The data cannot be used, or sliding windows are impossible with their format.
    """

    def __init__(self, data: FeaturesDataConfig):
        self.data = data
        options = clip_options(
            data, data.datasets, num_clips=data.num_segments or 1, resolution=data.resolution, random=False
        )
        self.options = check(options | {"num_workers": data.num_workers}, DataConfig, "data")
        self.transform = EvalTransform(data.resolution)
        self.dataset: video_dataset.Dataset = find("data", data.format.name).Dataset(
            self.options, self.transform, on_error="raise"
        )
        self._by_time = data.fps is not None or data.clip_duration is not None
        # Formats that read clips in their own way have no video to open.
        self._of_videos = type(self.dataset).read_views is video_dataset.Dataset.read_views
        if data.num_segments is None and not self._of_videos:
            raise ConfigError(
                f"data.num_segments: {data.format.name} has no video files for sliding windows; give a number of "
                "clips, 1 for images"
            )

    def num_clips(self, videos: Sequence[int]) -> Iterator[int | str]:
        """The number of clips of each of the videos, or why it cannot be read."""
        if self.data.num_segments is not None:
            yield from [self.data.num_segments] * len(videos)
            return
        yield from self._load(_Counts(self, videos), len(videos))

    def segments(self, counts: Sequence[tuple[int, int]]) -> Iterator[Segment]:
        """The clips of each (video, number of its clips), in order."""
        size = max(1, SEGMENT_BYTES // (3 * self.data.frames_per_clip * self.data.resolution**2))
        if not self._of_videos:
            size = max(1, self.data.num_segments or 1)
        parts = [(video, first, min(first + size, count)) for video, count in counts for first in range(0, count, size)]
        yield from self._load(_Segments(self, parts), len(parts))

    def clip_frames(self, video: Video) -> np.ndarray:
        """The frame numbers of all clips of a video, int64 [n, T]."""
        times = video.times if self._by_time else None
        if self.data.num_segments is None:
            return sliding_windows(video.num_frames, video.fps, self.options, self.data.overlap, times)
        return sample_frames(video.num_frames, video.fps, self.options, None, times)

    def read(self, index: int, first: int, stop: int) -> Segment:
        """Clips `first` to `stop` - 1 of a video. Raises VideoError where it cannot be read."""
        path = self.dataset.paths[index]
        if not self._of_videos:
            views, _ = self.dataset.read_views(path, numpy_generator(0, Purpose.CLIP, 0, index))
            return Segment(index, first, stop, views["clip"])
        video = self.dataset.open(path)
        numbers = self.clip_frames(video)[first:stop]
        clips = torch.stack(list(read_clips(video, numbers, path, self.transform)))
        return Segment(index, first, stop, clips, self._times(video, numbers[:, 0]))

    def _times(self, video: Video, starts: np.ndarray) -> np.ndarray:
        """Start and end, in seconds, of clips that begin with the frames `starts`: float64 [n, 2]."""
        window, length = clip_length(self.options, video.fps), video.num_frames
        times = np.append(video.times, video.times[-1] + 1 / video.fps)  # the end of the video
        ends = times[starts] + window / video.fps if self._by_time else times[np.minimum(starts + window, length)]
        return np.stack([times[starts], np.minimum(ends, times[-1])], axis=1).round(6)

    def check_usable(self, index: int) -> None:
        """Raises VideoError for a video that has crashed or blocked a worker."""
        if index in self.dataset.unreadable:
            raise VideoError(self.dataset.paths[index], self.dataset.unreadable[index])

    def _load(self, source: Any, length: int) -> Any:
        return Loader(source, range(length), min(self.data.num_workers, length), False, self.data.worker_timeout)


class _Counts:
    """A map from position to the number of clips of a video, or the reason why it cannot be opened."""

    def __init__(self, reader: ClipReader, videos: Sequence[int]):
        self.reader, self.videos, self.dataset = reader, videos, reader.dataset

    def __getitem__(self, position: int) -> int | str:
        index = self.videos[position]
        try:
            self.reader.check_usable(index)
            with reading(index):
                return len(self.reader.clip_frames(self.dataset.open(self.dataset.paths[index])))
        except VideoError as error:
            return error.reason


class _Segments:
    """A map from position to a segment."""

    def __init__(self, reader: ClipReader, parts: Sequence[tuple[int, int, int]]):
        self.reader, self.parts, self.dataset = reader, parts, reader.dataset

    def __getitem__(self, position: int) -> Segment:
        index, first, stop = self.parts[position]
        try:
            self.reader.check_usable(index)
            with reading(index):
                return self.reader.read(index, first, stop)
        except VideoError as error:
            return Segment(index, first, stop, torch.empty(0), error=error.reason)
