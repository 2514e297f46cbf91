import gzip
import math
import struct

import numpy as np
import pytest
import torch

from tubelet.config import ConfigError
from tubelet.data import DataConfig, Draw
from tubelet.data.moving_mnist import Dataset, annotated_digits, bouncing_digits, read_labels
from tubelet.data.transforms import EvalTransform


@pytest.fixture
def digits():
    return np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)


def idx(images):
    return struct.pack(">4I", 2051, *images.shape) + images.tobytes()


@pytest.fixture
def digit_file(digits, tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(idx(digits))
    return str(path)


def dataset(*entries, seed=0, **options):
    data = DataConfig(**{"datasets": list(entries), "num_frames": 20, "sampling_rate": 1, "crop_size": 64, **options})
    return Dataset(data, EvalTransform(data.crop_size), seed=seed)


def clip(data, index, epoch=0):
    """[T, 64, 64]; all color channels are equal."""
    frames = data[Draw(0, epoch, index, 0)].clips[0]
    assert torch.equal(frames, frames[:1].expand(3, -1, -1, -1))
    return frames[0].numpy()


def published(digits, length, rng):
    """The published rules, one digit, frame and coordinate at a time."""
    frames = np.zeros((length, 64, 64), dtype=np.uint8)
    for digit in digits[rng.integers(len(digits), size=2)]:
        y, x = rng.random(2).tolist()
        theta = rng.random() * 2 * math.pi
        v_y, v_x = math.sin(theta), math.cos(theta)
        for frame in frames:
            y += v_y * 0.1
            x += v_x * 0.1
            if x <= 0:
                x, v_x = 0, -v_x
            if x >= 1:
                x, v_x = 1, -v_x
            if y <= 0:
                y, v_y = 0, -v_y
            if y >= 1:
                y, v_y = 1, -v_y
            top, left = int(36 * y), int(36 * x)
            for row in range(28):
                for column in range(28):
                    pixel = max(frame[top + row, left + column], digit[row, column])
                    frame[top + row, left + column] = pixel
    return frames


@pytest.mark.parametrize("seed", range(4))
def test_clips_follow_the_published_rules(digits, seed):
    ours = bouncing_digits(digits, 30, np.random.default_rng(seed))
    assert np.array_equal(ours, published(digits, 30, np.random.default_rng(seed)))


def test_clips_are_a_function_of_seed_pass_and_number(digit_file):
    data = dataset(digit_file)
    assert (len(data), data.sizes, set(data.labels)) == (7, [7], {-1})
    first = clip(data, 3)
    assert np.array_equal(first, clip(dataset(digit_file), 3))
    assert np.array_equal(first[:12], clip(dataset(digit_file, num_frames=12), 3))
    for other in (clip(data, 4), clip(data, 3, epoch=1), clip(dataset(digit_file, seed=1), 3)):
        assert not np.array_equal(first, other)


def test_compressed_files_and_two_entries(digits, digit_file, tmp_path):
    packed = tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(idx(digits)))
    both = dataset(digit_file, str(packed))
    assert both.sizes == [7, 7]
    assert np.array_equal(clip(dataset(str(packed)), 2), clip(dataset(digit_file), 2))
    assert clip(both, 12).shape == (20, 64, 64)


def test_published_test_clips(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (20, 5, 64, 64), dtype=np.uint8)
    np.save(tmp_path / "mnist_test_seq.npy", frames)
    data = dataset(str(tmp_path / "mnist_test_seq.npy"))
    assert len(data) == 5
    for number in range(5):
        assert np.array_equal(clip(data, number), frames[:, number])
    with pytest.raises(ConfigError, match="have 20 frames, but 25 are needed"):
        dataset(str(tmp_path / "mnist_test_seq.npy"), num_frames=24 + 1, tubelet_size=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no such file; give mnist_test_seq.npy or MNIST's"),
        (b"", "neither mnist_test_seq.npy nor MNIST's images"),
        (struct.pack(">2I", 2049, 3) + bytes(3), "neither mnist_test_seq.npy nor"),  # labels
        (struct.pack(">4I", 2051, 3, 28, 28) + bytes(28 * 28), "800 bytes for 3 images of 28x28"),
        (gzip.compress(b"x" * 5000)[:-20], "damaged"),
    ],
    ids=["missing", "empty", "labels", "short", "damaged"],
)
def test_other_files_are_an_error(tmp_path, content, message):
    path = tmp_path / "images"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        dataset(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("frames", [np.zeros((20, 3, 32, 32), np.uint8), np.zeros((20, 3, 64, 64), np.float32)])
def test_arrays_of_another_layout_are_an_error(tmp_path, frames):
    np.save(tmp_path / "other.npy", frames)
    with pytest.raises(ConfigError, match=r"other\.npy: holds .* expected the layout of mnist_test_seq\.npy"):
        dataset(str(tmp_path / "other.npy"))
    (tmp_path / "other.npy").write_bytes(b"no array")
    with pytest.raises(ConfigError, match="damaged, or not a .npy file"):
        dataset(str(tmp_path / "other.npy"))


def test_annotated_digits_can_be_put_together_again(digits):
    frames, numbers, corners = annotated_digits(digits, 9, np.random.default_rng(4))
    assert np.array_equal(frames, bouncing_digits(digits, 9, np.random.default_rng(4)))
    again = np.zeros_like(frames)
    for number, path in zip(numbers, corners, strict=True):
        for t, (y, x) in enumerate(path):
            box = again[t, y : y + 28, x : x + 28]
            np.maximum(box, digits[number], out=box)
    assert np.array_equal(again, frames)


@pytest.mark.parametrize("zipped", [False, True])
def test_labels_are_beside_the_images(digits, tmp_path, zipped):
    pack, end = (gzip.compress, ".gz") if zipped else (bytes, "")
    images = tmp_path / f"train-images-idx3-ubyte{end}"
    images.write_bytes(pack(idx(digits)))
    labels = tmp_path / f"train-labels-idx1-ubyte{end}"
    labels.write_bytes(pack(struct.pack(">2I", 2049, 7) + bytes(range(7))))
    assert read_labels(str(images)).tolist() == list(range(7))
    for content, message in (
        (struct.pack(">2I", 2049, 6) + bytes(6), "6 labels for the 7 images"),
        (struct.pack(">2I", 2049, 7) + bytes(6), "damaged"),
        (struct.pack(">2I", 2051, 7) + bytes(7), "not MNIST's labels"),
        (b"", "damaged"),
    ):
        labels.write_bytes(pack(content))
        with pytest.raises(ConfigError, match=message):
            read_labels(str(images))
    labels.unlink()
    with pytest.raises(ConfigError, match="its labels are not beside it"):
        read_labels(str(images))
