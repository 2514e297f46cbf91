"""Which frames of a video make up its clips, by V-JEPA's rules."""

import math

import numpy as np

from tubelet.data.options import DataConfig

ROUNDING = 1e-6
"""Seconds by which a frame may start late, because times are rounded."""


def frame_step(options: DataConfig, video_fps: float) -> float:
    """Distance between the frames of a clip in frames of the file; fractional where `fps` does not divide evenly."""
    if options.sampling_rate is not None:
        return float(options.sampling_rate)
    if options.fps is not None:
        return video_fps / options.fps
    if options.clip_duration is not None:
        return options.clip_duration * video_fps / options.num_frames
    return 1.0  # clips of one frame


def clip_length(options: DataConfig, video_fps: float) -> int:
    """Length of a clip in frames of the file."""
    return max(1, math.ceil(options.num_frames * frame_step(options, video_fps)))


def sample_frames(
    num_video_frames: int,
    video_fps: float,
    options: DataConfig,
    rng: np.random.Generator | None,
    times: np.ndarray | None = None,
) -> np.ndarray:
    """The frame numbers of the clips of a video.

    The video is divided into `num_clips` equal parts. Each clip takes every `frame_step`-th frame of a window in its
    part. Where a part is shorter than the window, the clip starts with the part and repeats its last frame; with
    `allow_clip_overlap` the windows are evenly spaced over the whole video instead, and only a video shorter than a
    window repeats its last frame.

    With `times`, parts, windows and distances are those of a video of constant rate and the same duration, and each of
    its frames is replaced by the frame that is presented at its time: the last one that starts by then.

    Args:
        num_video_frames: Length of the video.
        video_fps: Average frames per second of the video.
        options: Section `data`.
        rng: Draws the position of each window in its part; None, or `random_clip_sampling` false: the middle.
        times: Seconds from the first frame at which each frame is presented, ascending; None for a constant rate.

    Returns:
        int64 [num_clips, num_frames], each clip ascending.
    """
    if num_video_frames < 1:
        raise ValueError("a video without frames has no clips")
    window = clip_length(options, video_fps)
    part = num_video_frames // options.num_clips
    if part < window and options.allow_clip_overlap or part == 0:
        starts = np.linspace(0, max(0, num_video_frames - window), options.num_clips).astype(np.int64)
        last = np.full(options.num_clips, num_video_frames - 1)
    else:
        slack = max(0, part - window)
        if options.random_clip_sampling and rng is not None:
            shift = rng.integers(slack + 1, size=options.num_clips)
        else:
            shift = np.full(options.num_clips, slack // 2)
        starts = np.arange(options.num_clips) * part + shift
        last = np.arange(1, options.num_clips + 1) * part - 1
    return frames_of(starts, last, video_fps, options, times)


def frames_of(
    starts: np.ndarray, last: np.ndarray, video_fps: float, options: DataConfig, times: np.ndarray | None
) -> np.ndarray:
    """The frame numbers of clips, int64 [n, num_frames].

    Args:
        starts: First frame of each clip, int64 [n].
        last: The frame that each clip repeats where it would go beyond it, int64 [n].
        video_fps, options, times: See `sample_frames`.
    """
    offsets = np.arange(options.num_frames) * frame_step(options, video_fps)
    if times is None:
        return np.minimum(starts[:, None] + np.floor(offsets).astype(np.int64), last[:, None])
    moments = np.minimum(starts[:, None] + offsets, last[:, None]) / video_fps
    return np.searchsorted(times, moments + ROUNDING, side="right") - 1
