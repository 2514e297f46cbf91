"""Videos and images in one data set, as in V-JEPA 2's pretraining; an image is a clip that repeats it T times.

Entries of `data.datasets` may hold either or both; `data.datasets_weights` sets how often each is drawn.
"""

import numpy as np

from tubelet.data import image_dataset, storage, video_dataset
from tubelet.data.sources import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Source, read_source


class Dataset(video_dataset.Dataset):
    """Like `video_dataset.Dataset`; the suffix of a file decides whether it is read as a video or as an image."""

    def find_samples(self, entry: str) -> Source:
        image_dataset.check_one_clip(self.data)
        return read_source(entry, VIDEO_SUFFIXES | IMAGE_SUFFIXES, self.data.storage)

    def read_views(self, path: str, rng: np.random.Generator) -> tuple[video_dataset.Views, np.ndarray]:
        if storage.suffix(path) in IMAGE_SUFFIXES:
            return image_dataset.repeated_image(self, path, rng)
        return super().read_views(path, rng)
