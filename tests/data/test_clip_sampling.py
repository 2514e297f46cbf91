import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.data import DataConfig
from tubelet.data.clip_sampling import sample_frames


def options(**changed):
    return DataConfig(**{"datasets": ["x"], "num_frames": 4, **changed})


def slow(length, video_fps, o, starts):
    """The rules one frame at a time; `starts`: where the windows begin within their part, as drawn."""
    if o.sampling_rate is not None:
        step = o.sampling_rate
    else:
        step = video_fps / o.fps if o.fps is not None else o.clip_duration * video_fps / o.num_frames
    window = max(1, int(np.ceil(o.num_frames * step)))
    part = length // o.num_clips
    clips = []
    for clip in range(o.num_clips):
        frames = []
        for k in range(o.num_frames):
            offset = int(k * step)
            if part >= window:
                frames.append(clip * part + starts[clip] + offset)
            elif o.allow_clip_overlap or part == 0:
                room = max(0, length - window)
                begin = int(room * clip / (o.num_clips - 1)) if o.num_clips > 1 else 0
                frames.append(min(begin + offset, length - 1))
            else:
                frames.append(min(clip * part + offset, (clip + 1) * part - 1))
        clips.append(frames)
    return np.array(clips)


@pytest.mark.parametrize("rate", [{"sampling_rate": 3}, {"fps": 7.0}, {"clip_duration": 0.5}, {"fps": 60.0}])
@pytest.mark.parametrize("overlap", [False, True])
def test_against_one_frame_at_a_time(rate, overlap):
    for length, num_clips, fps in itertools.product((1, 2, 5, 11, 12, 13, 40, 300), (1, 2, 3, 8), (25.0, 29.97)):
        o = options(num_clips=num_clips, allow_clip_overlap=overlap, **rate)
        clips = sample_frames(length, fps, o, np.random.default_rng(length))
        # where windows fit, the first frame of a clip tells what was drawn
        starts = clips[:, 0] - np.arange(num_clips) * (length // num_clips)
        np.testing.assert_array_equal(clips, slow(length, fps, o, starts))
        assert clips.dtype == np.int64
        assert clips.min() >= 0
        assert clips.max() < length
        assert (np.diff(clips, axis=1) >= 0).all()


def test_every_window_within_its_part_is_equally_likely():
    o = options(num_clips=2, sampling_rate=2)  # windows of 8 in parts of 11: starts 0 to 3
    rng = np.random.default_rng(0)
    drawn = np.stack([sample_frames(22, 30, o, rng)[:, 0] for _ in range(4000)])
    for clip, first in ((0, 0), (1, 11)):
        starts, counts = np.unique(drawn[:, clip], return_counts=True)
        np.testing.assert_array_equal(starts, first + np.arange(4))
        assert abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


def test_not_at_random_is_in_the_middle():
    o = options(sampling_rate=2, random_clip_sampling=False)
    np.testing.assert_array_equal(sample_frames(28, 30, o, np.random.default_rng(0)), [[10, 12, 14, 16]])
    np.testing.assert_array_equal(sample_frames(28, 30, options(sampling_rate=2), None), [[10, 12, 14, 16]])


def test_short_videos():
    short = options(sampling_rate=4, num_clips=2)
    np.testing.assert_array_equal(sample_frames(12, 30, short, None), [[0, 4, 5, 5], [6, 10, 11, 11]])
    overlapping = options(sampling_rate=4, num_clips=2, allow_clip_overlap=True)
    np.testing.assert_array_equal(sample_frames(20, 30, overlapping, None), [[0, 4, 8, 12], [4, 8, 12, 16]])
    np.testing.assert_array_equal(sample_frames(1, 30, short, None), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="without frames"):
        sample_frames(0, 30, short, None)


def test_frames_a_second_are_met_although_they_do_not_divide():
    clip = sample_frames(1000, 29.97, options(num_frames=40, fps=8.0), None)[0]
    assert abs((clip[-1] - clip[0]) / 29.97 - 39 / 8) < 1 / 29.97


@pytest.mark.parametrize(
    "rate", [{"fps": f} for f in (1.0, 2.0, 4.0, 5.0, 7.5, 8.0, 10.0, 15.0, 30.0, 60.0)] + [{"clip_duration": 2.0}]
)
@pytest.mark.parametrize("video_fps", [24.0, 24000 / 1001, 25.0, 30.0, 30000 / 1001, 50.0, 60.0])
def test_times_of_a_constant_rate_change_nothing(rate, video_fps):
    for length, num_clips, overlap in itertools.product((1, 5, 300, 3001), (1, 3), (False, True)):
        o = options(num_frames=16, num_clips=num_clips, allow_clip_overlap=overlap, **rate)
        for seed in range(3):
            by_number = sample_frames(length, video_fps, o, np.random.default_rng(seed))
            times = np.arange(length) / video_fps
            by_time = sample_frames(length, video_fps, o, np.random.default_rng(seed), times)
            np.testing.assert_array_equal(by_time, by_number)


def test_frames_of_a_variable_rate_are_those_presented_at_the_wanted_times():
    rng = np.random.default_rng(0)
    times = np.concatenate([np.arange(0, 10, 1 / 60), np.arange(10, 40, 0.5), np.arange(40, 50, 1 / 30)])
    times = np.delete(times, rng.integers(1, len(times) - 1, 50))
    fps = (len(times) - 1) / times[-1]
    starts = np.arange(len(times)) / fps  # of windows; one of them gives the clip
    wanted = starts[:, None] + np.arange(8) / 4
    shown = [[max(i for i, t in enumerate(times) if t <= moment + 1e-6) for moment in row] for row in wanted]
    for num_clips, overlap in itertools.product((1, 4), (False, True)):
        o = options(num_frames=8, num_clips=num_clips, allow_clip_overlap=overlap, fps=4.0)
        for clip in sample_frames(len(times), fps, o, rng, times):
            assert clip.tolist() in shown
            distances = np.diff(times[clip])
            assert (np.abs(distances[times[clip][:-1] < 9] - 0.25) < 0.02).all() or times[clip][-1] > 9


RATES = st.one_of(
    st.integers(1, 12).map(lambda n: {"sampling_rate": n}),
    st.floats(0.3, 120).map(lambda f: {"fps": f}),
    st.floats(0.05, 20).map(lambda s: {"clip_duration": s}),
)
STEPS = st.lists(st.integers(1, 4000), min_size=0, max_size=60)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(RATES, st.integers(1, 5), st.booleans(), st.integers(0, 9), st.floats(1, 240), st.integers(1, 500))
def test_any_options_against_one_frame_at_a_time(rate, num_clips, overlap, seed, fps, length):
    o = options(num_clips=num_clips, allow_clip_overlap=overlap, **rate)
    clips = sample_frames(length, fps, o, np.random.default_rng(seed))
    starts = clips[:, 0] - np.arange(num_clips) * (length // num_clips)
    np.testing.assert_array_equal(clips, slow(length, fps, o, starts))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(RATES, st.integers(1, 4), st.booleans(), st.integers(0, 9), STEPS)
def test_any_times_against_one_frame_at_a_time(rate, num_clips, overlap, seed, steps):
    """Clips are those of a video of constant rate, each frame replaced by the one that is shown at its time."""
    times = np.concatenate([[0], np.cumsum(steps)]) / 1000
    fps = (len(times) - 1) / times[-1] if len(times) > 1 else 25.0
    o = options(num_clips=num_clips, allow_clip_overlap=overlap, **rate)
    clips = sample_frames(len(times), fps, o, np.random.default_rng(seed), times)
    plain = sample_frames(len(times), fps, o, np.random.default_rng(seed))  # the same draws
    step = o.sampling_rate or (fps / o.fps if o.fps else o.clip_duration * fps / o.num_frames)
    part = len(times) // num_clips
    for number, (clip, numbers) in enumerate(zip(clips, plain, strict=True)):
        whole = part == 0 or overlap and part < int(np.ceil(o.num_frames * step))
        last = len(times) - 1 if whole else (number + 1) * part - 1
        for k, frame in enumerate(clip):
            moment = min(numbers[0] + k * step, last) / fps
            assert frame == max(i for i, t in enumerate(times) if t <= moment + 1e-6)
