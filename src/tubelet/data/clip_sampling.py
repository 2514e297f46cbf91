"""Which frames of a video a clip shows: V-JEPA's rules as a pure function of the video's length and a random state."""

import math

import numpy as np

from tubelet.data import DataConfig


def frame_step(options: DataConfig, video_fps: float) -> float:
    """Frames of the file from one frame of the clip to the next; a fraction where `fps` does not divide evenly."""
    if options.sampling_rate is not None:
        return float(options.sampling_rate)
    if options.fps is not None:
        return video_fps / options.fps
    if options.clip_duration is not None:
        return options.clip_duration * video_fps / options.num_frames
    return 1.0  # clips of one frame


def clip_length(options: DataConfig, video_fps: float) -> int:
    """Length of a clip's window in frames of the file."""
    return max(1, math.ceil(options.num_frames * frame_step(options, video_fps)))


def sample_frames(
    num_video_frames: int, video_fps: float, options: DataConfig, rng: np.random.Generator | None
) -> np.ndarray:
    """Frame numbers [num_clips, num_frames], int64, ascending, each in 0 .. num_video_frames - 1.

    The video is cut into num_clips equal parts. A clip is every `frame_step`-th frame of a window in its part: at
    random, or in the middle (random_clip_sampling false, or rng None). In a part shorter than the window the clip
    starts with the part and repeats its last frame at the end; with allow_clip_overlap the windows are instead spread
    evenly over the whole video, and only a video shorter than one window repeats its last frame.
    """
    if num_video_frames < 1:
        raise ValueError("a video without frames has no clips")
    window = clip_length(options, video_fps)
    offsets = np.floor(np.arange(options.num_frames) * frame_step(options, video_fps)).astype(np.int64)
    part = num_video_frames // options.num_clips
    if part < window and options.allow_clip_overlap or part == 0:
        starts = np.linspace(0, max(0, num_video_frames - window), options.num_clips).astype(np.int64)
        last = np.full(options.num_clips, num_video_frames - 1)
    else:
        slack = max(0, part - window)
        at_random = options.random_clip_sampling and rng is not None
        shift = rng.integers(slack + 1, size=options.num_clips) if at_random else slack // 2
        starts = np.arange(options.num_clips) * part + shift
        last = np.arange(1, options.num_clips + 1) * part - 1
    return np.minimum(starts[:, None] + offsets, last[:, None])
