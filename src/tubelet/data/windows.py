"""Clips that cover a whole video, decoded in one pass over the file."""

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from tubelet.data.clip_sampling import clip_length, frame_step, frames_of
from tubelet.data.decoders import Video, iter_frames
from tubelet.data.options import DataConfig


def sliding_windows(
    num_video_frames: int, video_fps: float, options: DataConfig, overlap: int = 0, times: np.ndarray | None = None
) -> np.ndarray:
    """The frame numbers of clips that cover a video.

    Each clip starts `num_frames` - `overlap` of its own frames after the one before it, rounded down to a frame of the
    file. Where the last of these clips ends before the video, another one is aligned to the end. A video shorter than a
    clip has one, which repeats the last frame, as in `sample_frames`.

    Args:
        num_video_frames: Length of the video.
        video_fps: Frames per second of the video.
        options: Section `data`: number and distance of the frames of a clip.
        overlap: Frames of a clip that the next one has, too, 0 to `num_frames` - 1.
        times: See `sample_frames`.

    Returns:
        int64 [n, num_frames], each clip ascending, the clips by their starts.
    """
    if num_video_frames < 1:
        raise ValueError("a video without frames has no clips")
    if not 0 <= overlap < options.num_frames:
        raise ValueError(f"an overlap of {overlap} frames is impossible for clips of {options.num_frames}")
    step, window = frame_step(options, video_fps), clip_length(options, video_fps)
    last_start = max(0, num_video_frames - window)
    stride = (options.num_frames - overlap) * step
    starts = np.floor(np.arange(last_start // stride + 2) * stride).astype(np.int64)
    starts = np.unique([*starts[starts <= last_start], last_start])
    return frames_of(starts, np.full(len(starts), num_video_frames - 1), video_fps, options, times)


def read_clips(
    video: Video, numbers: np.ndarray, path: str, transform: Callable[[np.ndarray], Tensor]
) -> Iterator[Tensor]:
    """Decode and transform each frame once, whatever the number of clips that have it.

    Args:
        video: An open video.
        numbers: Frame numbers [n, T], each clip ascending, the clips by their first and last frames.
        path: Name of the video in error messages.
        transform: Maps uint8 [1, H, W, 3] to uint8 [1, 3, 1, h, w], the same for all frames.

    Yields:
        Clips uint8 [3, T, h, w], as soon as their last frame is decoded.

    Raises:
        VideoError: The video cannot be decoded.
    """
    wanted = np.unique(numbers)
    held: deque[tuple[int, Tensor]] = deque()
    waiting = iter(numbers.tolist())
    clip = next(waiting)
    for number, frame in zip(wanted.tolist(), iter_frames(video, wanted, path), strict=True):
        held.append((number, transform(np.ascontiguousarray(frame)[None])[0, :, 0]))
        while clip is not None and clip[-1] <= number:
            frames = dict(held)
            yield torch.stack([frames[i] for i in clip], dim=1)
            clip = next(waiting, None)
            while clip is not None and held and held[0][0] < clip[0]:
                held.popleft()
