"""Still images as clips that repeat the image T times: folders `root/<class>/*.jpg` or lists of `path label`."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tubelet.config import ConfigError
from tubelet.data import video_dataset
from tubelet.data.options import DataConfig
from tubelet.data.sources import IMAGE_SUFFIXES, Source, read_source
from tubelet.data.types import VideoError


class Dataset(video_dataset.Dataset):
    """Like `video_dataset.Dataset`; an image's label is the index of its class folder in alphabetical order.

    Attributes:
        classes: Names of the class folders, including empty ones; the same in all folders of `data.datasets`.
    """

    def find_samples(self, entry: str) -> Source:
        check_one_clip(self.data)
        source = read_source(entry, IMAGE_SUFFIXES)
        root = Path(entry).expanduser()
        if not root.is_dir():
            return source
        folders = [Path(path).relative_to(root).parts[0] for path in source.paths]
        classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not set(folders) <= set(classes):
            return source  # no class folders
        if self.classes not in ([], classes):
            raise ConfigError(f"data.datasets: '{entry}' has other class folders than the entries before it")
        self.classes = classes
        label_of = {name: label for label, name in enumerate(classes)}
        return Source(source.paths, [label_of[folder] for folder in folders])

    def read_views(self, path: str, rng: np.random.Generator) -> tuple[video_dataset.Views, np.ndarray]:
        return repeated_image(self, path, rng)


def check_one_clip(data: DataConfig) -> None:
    """Raise ConfigError where several clips of each sample are asked for."""
    if data.num_clips != 1:
        raise ConfigError(f"data.num_clips: {data.num_clips}: an image has a single clip; set it to 1")


def repeated_image(
    dataset: video_dataset.Dataset, path: str, rng: np.random.Generator
) -> tuple[video_dataset.Views, np.ndarray]:
    """Return the result of `read_views` for an image: the transformed image in all T frames of the clip."""
    views = dataset.transformed([read_image(path)[None]], rng)
    num_frames = dataset.data.num_frames
    repeated = {name: view.expand(-1, -1, num_frames, -1, -1).contiguous() for name, view in views.items()}
    return repeated, np.zeros((1, num_frames), dtype=np.int64)


def read_image(path: str) -> np.ndarray:
    """Read an image as upright uint8 [H, W, 3].

    Raises:
        VideoError: It cannot be read.
    """
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # PIL's readers raise any type of error for damaged files
        raise VideoError(path, f"cannot read this image: {type(error).__name__}: {error}") from error
