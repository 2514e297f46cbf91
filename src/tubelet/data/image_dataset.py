"""Clips of still images: folders `root/<class>/*.jpg` or lists `path label`. A clip shows its image T times."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from tubelet.config import ConfigError
from tubelet.data import VideoError, video_dataset
from tubelet.data.sources import IMAGE_SUFFIXES, Source, read_source


class Dataset(video_dataset.Dataset):
    """As `video_dataset.Dataset`; an image's label is the place of its class folder in the order of names.

    classes: the class folders' names, empty ones too; all folders of `data.datasets` must have the same.
    """

    def _read_source(self, entry: str) -> Source:
        if self.data.num_clips != 1:
            raise ConfigError(f"data.num_clips: {self.data.num_clips}: an image has one clip; set it to 1")
        source = read_source(entry, IMAGE_SUFFIXES)
        root = Path(entry).expanduser()
        if not root.is_dir():
            return source
        folders = [Path(path).relative_to(root).parts[0] for path in source.paths]
        classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not set(folders) <= set(classes):
            return source  # images beside each other, without class folders
        if self.classes not in ([], classes):
            raise ConfigError(f"data.datasets: '{entry}' has other class folders than the entries before it")
        self.classes = classes
        number = {name: label for label, name in enumerate(classes)}
        return Source(source.paths, [number[folder] for folder in folders])

    def _clips(self, path: str, rng: np.random.Generator) -> tuple[torch.Tensor, np.ndarray]:
        frames = read_image(path)[None]
        clip = self.transform(frames, rng).expand(-1, -1, self.data.num_frames, -1, -1).contiguous()
        return clip, np.zeros((1, self.data.num_frames), dtype=np.int64)


def read_image(path: str) -> np.ndarray:
    """uint8 [H, W, 3], upright; raises VideoError when it cannot be read."""
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # PIL's readers raise whatever the damage makes them stumble over
        raise VideoError(path, f"cannot read this image: {type(error).__name__}: {error}") from error
