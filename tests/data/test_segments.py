import os

import numpy as np
import pytest

from tubelet.data import DataConfig, Draw, VideoError, video_dataset
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.segments import fragment, part_of, split_segment
from tubelet.data.transforms import EvalTransform
from tubelet.probing import baselines
from tubelet.probing.cache import identity


@pytest.mark.parametrize("path", ["a.mp4", "a#t=b.mp4", "a.mp4#t=1", "a.mp4#1-95", "a.mp4#t=1,", "a.mp4#t=,2"])
def test_other_paths_are_whole_videos(path):
    assert split_segment(path) == (path, None)


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0.5, 2), (1e-3, 1e5), (1 / 3, 2 / 3)])
def test_segments_are_read_as_they_are_written(start, end):
    file, limits = split_segment(f"a #t=0,1.mp4{fragment(start, end)}")
    assert file == "a #t=0,1.mp4"
    assert limits == pytest.approx((start, end), abs=1e-6)


def test_a_sample_has_the_frames_of_its_segment_only(make_video, numbers_of, tmp_path):
    """Frame i of the file is presented at i / 10 seconds."""
    make_video(tmp_path / "a.mp4", frames=40, rate=10)
    (tmp_path / "list.csv").write_text("path,start,end,label\na.mp4,0,1,2\na.mp4,1.5,2.5,0\na.mp4,3.5,90,1\n")
    options = {"datasets": [str(tmp_path / "list.csv")], "num_frames": 4, "tubelet_size": 1, "sampling_rate": 1}
    data = DataConfig(**options, crop_size=96, patch_size=16)
    dataset = video_dataset.Dataset(data, EvalTransform(96))
    assert dataset.labels == [2, 0, 1]
    for index, (first, last) in enumerate([(0, 9), (15, 24), (35, 39)]):
        video = dataset.open(dataset.paths[index])
        assert video.num_frames == last - first + 1
        assert np.array_equal(numbers_of(video.frames_at(np.arange(video.num_frames))), np.arange(first, last + 1))
        np.testing.assert_allclose(video.times, np.arange(video.num_frames) / 10, atol=1e-3)
        sample = dataset[Draw(0, 0, index, 0)]
        assert sample.frames.min() >= 0
        assert sample.frames.max() <= last - first
        assert sample.path == dataset.paths[index]


def test_a_segment_without_frames_is_a_bad_video(make_video, tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=10, rate=10)
    with pytest.raises(VideoError, match=r"a\.mp4#t=1,2: no frame is in this segment; the file has 1.0 seconds"):
        open_video(path + fragment(1, 2), "pyav")


def test_segments_are_opened_by_path_everywhere(make_video, numbers_of, tmp_path):
    path = make_video(tmp_path / "a.mp4", frames=30, rate=10)
    part = path + fragment(1, 2)
    frames = read_frames(open_video(part, "pyav"), np.arange(10), part)
    assert numbers_of(frames).tolist() == list(range(10, 20))
    assert part_of(open_video(path, "pyav"), (1, 2), part).num_frames == 10
    assert baselines.describe(part, 2, True, "pyav")["metadata"][3] == 10
    before = identity(part)
    assert before != identity(path)
    os.utime(path, (1, 1))
    assert identity(part) != before, "features of a changed file are not reused"
