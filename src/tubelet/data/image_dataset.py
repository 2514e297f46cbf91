"""Still images as clips that repeat the image T times: folders `root/<class>/*.jpg` or lists of `path label`."""

from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import Image, ImageOps

from tubelet.config import ConfigError
from tubelet.data import storage, video_dataset
from tubelet.data.options import DataConfig
from tubelet.data.sources import IMAGE_SUFFIXES, Source, read_source
from tubelet.data.storage import DEFAULT_STORAGE, StorageConfig
from tubelet.data.types import VideoError


class Dataset(video_dataset.Dataset):
    """Like `video_dataset.Dataset`; an image's label is the index of its class folder in alphabetical order.

    Attributes:
        classes: Names of the class folders, including empty ones; the same in all folders of `data.datasets`.
    """

    def find_samples(self, entry: str) -> Source:
        check_one_clip(self.data)
        source = read_source(entry, IMAGE_SUFFIXES, self.data.storage)
        remote = storage.is_remote(entry)
        root = entry.rstrip("/") if remote else str(Path(storage.local_path(entry)))
        if not all(path.startswith(f"{root}/") for path in source.paths):
            return source  # a list or a single file
        below = [path[len(root) + 1 :].split("/") for path in source.paths]
        folders = [names[0] for names in below]
        if remote:  # object stores have no empty folders
            classes = sorted({names[0] for names in below if len(names) > 1})
        else:
            classes = sorted(p.name for p in Path(root).iterdir() if p.is_dir() and not p.name.startswith("."))
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
    views = dataset.transformed([read_image(path, dataset.data.storage)[None]], rng)
    num_frames = dataset.data.num_frames
    repeated = {name: view.expand(-1, -1, num_frames, -1, -1).contiguous() for name, view in views.items()}
    return repeated, np.zeros((1, num_frames), dtype=np.int64)


def read_image(path: str, options: StorageConfig = DEFAULT_STORAGE) -> np.ndarray:
    """Read an image as upright uint8 [H, W, 3].

    Raises:
        VideoError: It cannot be read.
    """
    try:
        with storage.open_part(path, options) as file, Image.open(cast(BinaryIO, file)) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except storage.StorageError as error:
        raise VideoError(path, storage.reason(error)) from error
    except Exception as error:  # PIL's readers raise any type of error for damaged files
        raise VideoError(path, f"cannot read this image: {type(error).__name__}: {error}") from error
