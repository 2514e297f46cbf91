"""Moving MNIST (Srivastava et al. 2015): two digits that fly about in a black square and bounce off its edges.

Entries of `data.datasets` are `mnist_test_seq.npy`, the published 10,000 test clips of 20 frames, or a file of MNIST's
images (`train-images-idx3-ubyte`, also as `.gz`), from whose digits clips are made by the published rules: as many as
there are digits, and others in every pass.
"""

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tubelet.config import ConfigError
from tubelet.data import video_dataset
from tubelet.data.clip_sampling import clip_length, sample_frames
from tubelet.data.sources import NO_LABEL, Source

SIDE = 64
DIGITS = 2
STEP = 0.1
"""Speed: share of the way from edge to edge that a digit covers in a frame."""
FPS = 10.0  # for `data.fps`; the set has none of its own
IDX_IMAGES = 2051  # first number of an idx file of images: unsigned bytes, three axes


class Dataset(video_dataset.Dataset):
    """As `video_dataset.Dataset`, without labels; a sample's path is its file and its number in it.

    Raises ConfigError for a file that is missing or neither of the two kinds.
    """

    def __init__(self, *arguments: Any, **options: Any):
        self._content: dict[str, np.ndarray] = {}
        super().__init__(*arguments, **options)

    def _read_source(self, entry: str) -> Source:
        content = self._content[entry] = read_file(entry)
        wanted = self.data.num_clips * clip_length(self.data, FPS)
        if content.ndim == 4 and len(content) < wanted:
            raise ConfigError(
                f"data.datasets: {entry}: its clips have {len(content)} frames, and {wanted} are asked for; ask for "
                "fewer, or give MNIST's images, from which clips of any length are made"
            )
        number = content.shape[1] if content.ndim == 4 else len(content)
        return Source([f"{entry}#{i}" for i in range(number)], [NO_LABEL] * number)

    def _clips(self, path: str, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
        entry, _, number = path.rpartition("#")
        content = self._content[entry]
        if content.ndim == 4:
            frames = content[:, int(number)]
        else:
            frames = bouncing_digits(content, self.data.num_clips * clip_length(self.data, FPS), rng)
        numbers = sample_frames(len(frames), FPS, self.data, rng)
        coloured = np.repeat(frames[numbers.reshape(-1), :, :, None], 3, axis=-1)
        return torch.cat([self.transform(clip, rng) for clip in np.split(coloured, self.data.num_clips)]), numbers


def bouncing_digits(digits: np.ndarray, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """uint8 [T, 64, 64]: two of `digits` [N, h, w] from anywhere in any direction; where they overlap, the brighter."""
    frames = np.zeros((num_frames, SIDE, SIDE), dtype=np.uint8)
    height, width = digits.shape[1:]
    for digit in digits[rng.integers(len(digits), size=DIGITS)]:
        corners = trajectory(num_frames, rng) * (SIDE - height, SIDE - width)
        for frame, (top, left) in zip(frames, corners.astype(int).tolist(), strict=True):
            place = frame[top : top + height, left : left + width]
            np.maximum(place, digit, out=place)
    return frames


def trajectory(num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Places (y, x) in the unit square, [T, 2]: a straight line at constant speed that turns back at each edge."""
    place, angle = rng.random(2), 2 * math.pi * rng.random()
    velocity = STEP * np.array([math.sin(angle), math.cos(angle)])
    places = np.empty((num_frames, 2))
    for t in range(num_frames):
        place = place + velocity
        velocity = np.where((place <= 0) | (place >= 1), -velocity, velocity)
        place = places[t] = place.clip(0, 1)
    return places


def read_file(entry: str) -> np.ndarray:
    """uint8: the frames [20, N, 64, 64] of the published test clips, or MNIST's digits [N, h, w]."""
    path = Path(entry).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"data.datasets: '{entry}': no such file; give mnist_test_seq.npy or MNIST's train-images-idx3-ubyte, "
            "which torchvision.datasets.MNIST(folder, download=True) puts into folder/MNIST/raw"
        )
    if path.suffix == ".npy":
        return _read_sequences(path)
    return _read_digits(path)


def _read_sequences(path: Path) -> np.ndarray:
    try:
        frames = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        raise ConfigError(f"data.datasets: {path}: damaged, or no .npy file ({error})") from None
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[2:] != (SIDE, SIDE) or not frames.size:
        raise ConfigError(
            f"data.datasets: {path}: holds {frames.dtype} {list(frames.shape)}; expected the layout of "
            f"mnist_test_seq.npy, uint8 [frames, clips, {SIDE}, {SIDE}]"
        )
    return frames


def _read_digits(path: Path) -> np.ndarray:
    """The idx format: big-endian numbers 2051, N, height, width, then the pixels."""
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError) as error:
            raise ConfigError(f"data.datasets: {path}: damaged ({error})") from None
    first, number, height, width = np.frombuffer(content[:16].ljust(16, b"\0"), ">u4").tolist()
    if first != IDX_IMAGES:
        raise ConfigError(
            f"data.datasets: {path}: neither mnist_test_seq.npy nor MNIST's images in the idx format "
            "(train-images-idx3-ubyte or t10k-images-idx3-ubyte, also as .gz)"
        )
    if len(content) != 16 + number * height * width or not 0 < max(height, width) <= SIDE:
        raise ConfigError(
            f"data.datasets: {path}: damaged: {len(content)} bytes for {number} images of {height}x{width}"
        )
    return np.frombuffer(content, np.uint8, offset=16).reshape(number, height, width)
