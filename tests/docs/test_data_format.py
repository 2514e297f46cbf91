"""The example of docs/extending/data_format.md reads the frames of its folders, and trains."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tests.docs.runs import make_options, train
from tubelet.config import ConfigError, check, registry
from tubelet.data import DataConfig, Draw

NAME = "ideas.frame_folders"


@pytest.fixture
def frames(tmp_path):
    """Four videos of 12 frames; the color of a frame is its number."""
    folder = tmp_path / "frames"
    for number, name in enumerate(("run/a", "run/b", "walk/a", "walk/b")):
        (folder / name).mkdir(parents=True)
        for frame in range(12):
            picture = Image.fromarray(np.full((40, 48, 3), 20 * frame + number, np.uint8))
            picture.save(folder / name / f"{frame:04d}.png")
    return folder


def data_options(frames, **options):
    raw = make_options(frames).data.model_dump() | {"datasets": [str(frames)], "format": NAME}
    return raw | options


def make_dataset(frames, **options):
    def transform(clip, rng):
        return torch.from_numpy(clip).permute(3, 0, 1, 2)[None]

    data = check(data_options(frames, **options), DataConfig, "the options")
    return registry.find("data", NAME).Dataset(data, transform)


def test_clips_have_the_frames_of_their_files(checkout, frames):
    dataset = make_dataset(frames)
    assert list(dataset.labels) == [0, 0, 1, 1]
    assert dataset.classes == ["run", "walk"]
    for index in range(4):
        sample = dataset[Draw(step=0, epoch=0, index=index, position=0)]
        shown = sample.views["clip"][0, 0, :, 0, 0]
        assert shown.tolist() == (20 * sample.frames[0] + index).tolist()


def test_frames_per_second(checkout, frames):
    options = {"sampling_rate": None, "fps": 5.0, "num_frames": 4}
    sample = make_dataset(frames, format={"name": NAME, "fps": 10.0}, **options)[
        Draw(step=0, epoch=0, index=0, position=0)
    ]
    assert sample.frames[0].diff().tolist() == [2, 2, 2]


def test_format_trains(checkout, frames):
    (frames / "walk" / "b" / "0003.png").write_bytes(b"damaged")
    options = make_options(frames, data=data_options(frames, max_bad_fraction=1.0))
    assert math.isfinite(train(options)[-1]["loss"])


def test_a_folder_without_frames_is_an_error(checkout, frames):
    with pytest.raises(ConfigError, match="no files <class>/<video>/<frame>.png"):
        make_dataset(frames, datasets=[str(frames / "run")])
