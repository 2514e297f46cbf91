import numpy as np
import pytest
from PIL import Image

from tubelet.config import ConfigError
from tubelet.data import AugConfig, DataConfig, Draw, VideoError
from tubelet.data.image_dataset import Dataset
from tubelet.data.transforms import EvalTransform, TrainTransform


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat/1.png", "cat/deep/2.png", "dog/1.png", "axe/1.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(path)
    Image.new("L", (32, 32), 7).save(tmp_path / "images" / "dog" / "grey.png")
    return tmp_path / "images"


def images(*entries, frames=1, transform=None, **changed):
    options = DataConfig(
        datasets=[str(entry) for entry in entries], num_frames=frames, sampling_rate=1, crop_size=32, **changed
    )
    return Dataset(options, transform or EvalTransform(32), on_error="raise")


def test_labels_are_the_class_folders_in_order(folder):
    dataset = images(folder)
    assert dataset.classes == ["axe", "cat", "dog"]
    assert dataset.labels == [0, 1, 1, 2, 2]


def test_empty_class_folders_are_classes_and_hidden_folders_are_not(folder):
    for name in ("bee", ".cache"):
        (folder / name).mkdir()
    dataset = images(folder)
    assert (dataset.classes, dataset.labels) == (["axe", "bee", "cat", "dog"], [0, 2, 2, 3, 3])


def test_a_clip_shows_its_image_in_each_frame(folder):
    sample = images(folder, frames=4)[Draw(0, 0, 3, 0)]
    pixels = np.array(Image.open(folder / "dog" / "1.png"))
    assert sample.clips.shape == (1, 3, 4, 32, 32)
    for frame in range(4):
        np.testing.assert_array_equal(sample.clips[0, :, frame].permute(1, 2, 0), pixels[:, 8:40])
    assert (images(folder)[Draw(0, 0, 4, 0)].clips == 7).all()
    views = images(folder, frames=2, transform=EvalTransform(32, 3))[Draw(0, 0, 3, 0)].clips
    assert views.shape == (3, 3, 2, 32, 32)
    augmented = images(folder, frames=2, transform=TrainTransform(AugConfig(), 32))[Draw(0, 0, 3, 0)].clips
    assert (augmented[:, :, 0] == augmented[:, :, 1]).all()


def test_lists_flat_folders_and_errors(folder, tmp_path):
    (tmp_path / "list.csv").write_text("images/dog/1.png 5\nimages/cat/1.png 6\n")
    assert images(tmp_path / "list.csv").labels == [5, 6]
    assert images(folder / "axe").labels == [-1]
    (tmp_path / "other" / "bird").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "other" / "bird" / "1.png")
    with pytest.raises(ConfigError, match="other class folders"):
        images(folder, tmp_path / "other")
    with pytest.raises(ConfigError, match="an image has a single clip"):
        images(folder, num_clips=2)
    (folder / "axe" / "1.png").write_bytes((folder / "axe" / "1.png").read_bytes()[:100])
    with pytest.raises(VideoError, match="cannot read this image"):
        images(folder)[Draw(0, 0, 0, 0)]
