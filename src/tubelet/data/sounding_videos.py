"""Clips of videos with the sound of the time that the clip shows."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from tubelet.config import Config, ConfigError
from tubelet.config.registry import PartOptions
from tubelet.data import video_dataset
from tubelet.data.clip_sampling import clip_length, sample_frames
from tubelet.data.decoders import read_frames
from tubelet.data.frame_cache import cached_sound
from tubelet.data.options import DataConfig
from tubelet.data.segments import VideoPart, part_of, split_segment
from tubelet.data.sound import SoundError, Span, read_sound
from tubelet.data.types import BadFile, Sample, VideoError
from tubelet.data.video_dataset import Transform, Views
from tubelet.grid import SoundShape

Modality = Literal["video", "sound"]
MODALITIES: tuple[Modality, ...] = ("video", "sound")


class SoundConfig(Config):
    """How the sound of a clip is read."""

    sample_rate: int = Field(16_000, ge=1000)
    """Samples per second; other rates are resampled."""
    channels: Literal[1, 2] = 1
    """Mono or stereo; files with other channels are mixed."""
    missing: Literal["silence", "exclude"] = "silence"
    """What happens with a file without usable sound: silence in its place, or it is left out, as a file whose pictures
    cannot be read. Both are listed in bad_files.txt and results.json."""


class FormatOptions(PartOptions, SoundConfig):
    """Video files of which the sound is read, too."""

    name: str = "sounding_videos"

    def sound_of_clip(self, data: DataConfig) -> SoundShape:
        """Return the size of the sound of a clip.

        Raises:
            ConfigError: The duration of a clip is not fixed.
        """
        seconds = seconds_of_clip(data.num_frames, data.clip_duration, data.fps)
        return SoundShape(round(seconds * self.sample_rate), self.sample_rate, self.channels)


class Dataset(video_dataset.Dataset):
    """Samples with the views `clip`, uint8 [1, C, T, H, W], and `sound`, float32 [1, channels, samples].

    Args:
        data: How clips are made, one of each video; needs `clip_duration` or `fps`, so that all last equally long.
            `format` says how the sound is read.
        transform: See `tubelet.data.transforms`.
        modalities: The views to read.
        margin: Seconds of sound before and after the clip that `sound` has besides. Clips are taken from where these
            are inside of the video, so that no silence tells where it begins or ends.
        kwargs: Further arguments of `video_dataset.Dataset`.

    Raises:
        ConfigError: The duration of a clip is not fixed, or there are several clips of each video.
    """

    def __init__(
        self,
        data: DataConfig,
        transform: Transform,
        *,
        modalities: Sequence[Modality] = MODALITIES,
        margin: float = 0.0,
        **kwargs: Any,
    ):
        assert isinstance(data.format, FormatOptions)
        self.sound, self.modalities, self.margin = data.format, tuple(modalities), margin
        if data.num_clips != 1:
            raise ConfigError(f"data.num_clips: {data.num_clips} clips of a video; with sound, set it to 1")
        self.num_samples = self.sound.sound_of_clip(data).num_samples + 2 * round(margin * self.sound.sample_rate)
        self._no_sound: SoundError | None = None
        """Why the sample that was read last has silence in place of its sound."""
        super().__init__(data, transform, **kwargs)

    def read_views(self, path: str, rng: np.random.Generator) -> tuple[Views, np.ndarray]:
        try:
            video = self.open(path)
            window = clip_length(self.data, video.fps)
            if self.margin:
                duration = video.num_frames / video.fps
                needed = window / video.fps + 2 * self.margin
                if duration < needed - 1 / video.fps:
                    reason = f"{duration:.2f} seconds, fewer than the {needed:.2f} of a clip with its margins of sound"
                    raise VideoError(path, reason, filtered=True)
                video = part_of(video, (self.margin, max(duration - self.margin, window / video.fps)), path)
        except VideoError as error:
            error.always = not isinstance(error.__cause__, (OSError, MemoryError))
            raise
        numbers = sample_frames(video.num_frames, video.fps, self.data, rng, video.times)
        views: Views = {}
        if "sound" in self.modalities:
            start = (video.start if isinstance(video, VideoPart) else 0.0) + float(video.times[numbers[0, 0]])
            views["sound"] = torch.from_numpy(self.read_sound(path, start - self.margin))[None]
        if "video" in self.modalities:
            views |= self.transformed([read_frames(video, numbers[0], path)], rng)
        return views, numbers

    def read_sound(self, path: str, start: float) -> np.ndarray:
        """Return the sound [channels, samples] from `start` seconds after the first frame of the file."""
        source, status = self.locate(path)
        span = Span(start, self.num_samples, self.sound.sample_rate)
        try:
            if self.data.cache is None:
                return read_sound(source, span, self.sound.channels)
            return cached_sound(split_segment(path)[0], self.sound.channels, self.data.cache, source, status).read(span)
        except SoundError as error:
            if self.sound.missing == "exclude":
                raise
            self._no_sound = error
            return np.zeros((self.sound.channels, self.num_samples), np.float32)

    def _read(self, index: int, epoch: int, bad: Iterable[BadFile]) -> Sample:
        self._no_sound = None
        sample = super()._read(index, epoch, bad)
        if self._no_sound is None:
            return sample
        silent = BadFile(sample.path, f"{self._no_sound.reason}; silence in its place", filtered=True)
        return dataclasses.replace(sample, bad=(*sample.bad, silent))


def seconds_of_clip(num_frames: int, clip_duration: float | None, fps: float | None) -> float:
    """Return the duration of each clip. Raises ConfigError where it depends on the file."""
    if clip_duration is not None:
        return clip_duration
    if fps is None:
        raise ConfigError("clips with sound need the same duration in all files; give data.clip_duration or data.fps")
    return num_frames / fps
