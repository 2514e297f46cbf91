"""Videos and images in one data set: each sample is that of the data set of its kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from tubelet.config import ConfigError
from tubelet.data import AugConfig, DataConfig, Draw, image_dataset, mixed_dataset, video_dataset
from tubelet.data.streams import SampleStream
from tubelet.data.transforms import TrainTransform


@pytest.fixture
def folders(make_video, tmp_path):
    """A folder with 2 videos, one with 6 images, and one with both."""
    rng = np.random.default_rng(0)
    for name in ("videos", "images", "both"):
        (tmp_path / name).mkdir()
    for name in ("videos/1.mp4", "videos/2.mp4", "both/a.mp4"):
        make_video(tmp_path / name, frames=9, height=48, width=64)
    for name in (*(f"images/{i}.png" for i in range(6)), "both/b.PNG"):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def make(module, *entries, **changed):
    data = {"num_frames": 4, "sampling_rate": 2, "crop_size": 32, **changed}
    options = DataConfig(datasets=[str(entry) for entry in entries], **data)
    return module.Dataset(options, TrainTransform(AugConfig(), 32), seed=3)


def test_samples_equal_those_of_the_data_sets_of_each_kind(folders):
    mixed = make(mixed_dataset, folders / "videos", folders / "images", folders / "both")
    videos = make(video_dataset, folders / "videos")
    assert mixed.sizes == [2, 6, 2]
    for index in range(2):
        assert torch.equal(mixed[Draw(0, 1, index, 0)].clips, videos[Draw(0, 1, index, 0)].clips)
    assert [path.rsplit("/", 1)[1] for path in mixed.paths[8:]] == ["a.mp4", "b.PNG"]
    for index in range(2, 8):
        clips = mixed[Draw(0, 1, index, 0)].clips
        assert clips.shape == (1, 3, 4, 32, 32)
        assert (clips == clips[:, :, :1]).all()


def test_an_image_has_the_pixels_of_the_image_data_set(folders):
    mixed, images = make(mixed_dataset, folders / "images"), make(image_dataset, folders / "images")
    for index in range(6):
        assert torch.equal(mixed[Draw(0, 1, index, 0)].clips, images[Draw(0, 1, index, 0)].clips)


def test_weights_set_how_often_images_are_drawn(folders):
    mixed = make(mixed_dataset, folders / "videos", folders / "images", datasets_weights=[0.75, 0.25])
    stream = SampleStream(mixed.sizes, mixed.data.datasets_weights, batch_size=4, seed=0)
    drawn = [draw.index for step in range(20) for draw in stream.draws(step)]
    assert np.mean([index >= 2 for index in drawn]) == 0.25


def test_several_clips_of_an_image_are_refused(folders):
    with pytest.raises(ConfigError, match="data.num_clips: 2: an image has a single clip"):
        make(mixed_dataset, folders / "images", num_clips=2)
