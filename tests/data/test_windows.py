"""Sliding windows, and their frames from one pass over the file."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tubelet.config import check
from tubelet.data import DataConfig, VideoError
from tubelet.data.clip_sampling import clip_length, sample_frames
from tubelet.data.decoders import iter_frames, open_video, read_frames
from tubelet.data.transforms import EvalTransform
from tubelet.data.windows import read_clips, sliding_windows

RATES = [{"sampling_rate": 1}, {"sampling_rate": 4}, {"fps": 12.0}, {"clip_duration": 0.9}, {"fps": 75.0}]


def options(frames=8, **rate):
    raw = {"datasets": ["x"], "num_frames": frames, "random_clip_sampling": False, "allow_clip_overlap": True}
    return check({**raw, **rate, "tubelet_size": 1, "crop_size": 16, "patch_size": 1}, DataConfig, "test")


@pytest.mark.parametrize("rate", RATES, ids=str)
@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_windows_cover_the_video_as_a_slow_loop_does(rate, overlap):
    o = options(**rate)
    for length in (1, 5, 8, 31, 32, 33, 64, 100, 257):
        step = {"sampling_rate": o.sampling_rate, "fps": 30 / (o.fps or 1), "clip_duration": 0.9 * 30 / 8}
        step = float(step[next(iter(rate))])
        window, expected, number = clip_length(o, 30.0), [], 0
        while (start := int(number * (8 - overlap) * step)) + window <= length:
            if start not in expected:
                expected.append(start)
            number += 1
        if not expected or expected[-1] + window < length:
            expected.append(max(0, length - window))
        found = sliding_windows(length, 30.0, o, overlap)
        assert found[:, 0].tolist() == expected
        frames = [[min(start + int(j * step), length - 1) for j in range(8)] for start in expected]
        assert found.tolist() == frames


def test_a_short_video_has_the_clip_of_the_loader():
    o = options(sampling_rate=4)
    for length in (1, 10, 32):
        np.testing.assert_array_equal(sliding_windows(length, 30.0, o, 5), sample_frames(length, 30.0, o, None))


def test_no_overlap_but_less_than_a_clip():
    for overlap in (-1, 8):
        with pytest.raises(ValueError, match="impossible"):
            sliding_windows(100, 30.0, options(sampling_rate=1), overlap)


@pytest.fixture
def long(make_video, tmp_path):
    """60 frames with B frames and several key frames."""
    return make_video(tmp_path / "v.mp4", frames=60, options={"crf": "12", "g": "25", "bf": "3"})


@pytest.mark.parametrize("kind", ["pyav", "decord", "avi", "rotated view"])
def test_clips_of_one_pass_are_those_read_one_by_one(kind, long, make_video, tmp_path):
    path = long
    if kind == "avi":  # frames are counted
        path = make_video(tmp_path / "v.avi", frames=60, codec="mpeg4", options={"qscale": "2"})
    video = open_video(path, "decord" if kind == "decord" else "pyav")
    if kind == "rotated view":
        upright = video
        video = SimpleNamespace(frames_at=lambda i: np.rot90(upright.frames_at(i), 2, (1, 2)), num_frames=60, fps=30.0)
    transform = EvalTransform(32)
    for numbers in (
        sliding_windows(60, 30.0, options(sampling_rate=2), 5),
        sliding_windows(60, 30.0, options(fps=11.0), 2),
        sample_frames(60, 30.0, options(sampling_rate=3).model_copy(update={"num_clips": 4}), None),
        sliding_windows(60, 30.0, options(sampling_rate=4), 6)[1:],
    ):
        found = list(read_clips(video, numbers, path, transform))
        expected = [transform(np.ascontiguousarray(read_frames(video, clip, path)))[0] for clip in numbers]
        assert len(found) == len(expected) > 1
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_each_frame_is_decoded_once(long):
    video, seen = open_video(long, "pyav"), []
    decode = type(video)._decode

    def counting(self, *arguments):
        for frame in decode(self, *arguments):
            seen.append(frame.pts)
            yield frame

    video._decode = counting.__get__(video)
    numbers = sliding_windows(60, 30.0, options(sampling_rate=1), 7)
    assert len(list(read_clips(video, numbers, long, EvalTransform(16)))) == 53
    assert len(seen) == len(set(seen)) == 60


def test_a_damaged_video_is_a_video_error(broken_video):
    video = open_video(broken_video, "pyav")
    with pytest.raises(VideoError, match="cannot decode"):
        list(iter_frames(video, np.arange(video.num_frames), broken_video))
