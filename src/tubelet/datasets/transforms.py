"""What is done to the frames of a clip, on uint8: a window is cut out first, then only the window is resized."""

import numpy as np
import torch

from tubelet.datasets import AugConfig


def crop_and_resize(
    frames: np.ndarray, top: int, left: int, height: int, width: int, size: tuple[int, int]
) -> torch.Tensor:
    """The window of uint8 frames [T, H, W, C] resized (bilinear, antialiased) to uint8 [T, C, *size]."""
    window = torch.from_numpy(frames[:, top : top + height, left : left + width]).permute(0, 3, 1, 2)
    if (height, width) == size:
        return window
    return torch.nn.functional.interpolate(window, size=size, mode="bilinear", antialias=True)


class TrainTransform:
    """Random resized crop and flip, and what `AugConfig` asks for beyond."""

    def __init__(self, augmentation: AugConfig, crop_size: int):
        self.augmentation, self.crop_size = augmentation, crop_size

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [T, H, W, C] -> uint8 [1, C, T, crop, crop], one view."""
        window = random_window(frames.shape[1], frames.shape[2], self.augmentation, rng)
        clip = crop_and_resize(frames, *window, (self.crop_size, self.crop_size))
        if self.augmentation.horizontal_flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        return clip.permute(1, 0, 2, 3).contiguous()[None]


class EvalTransform:
    """Short side to crop_size, then `views` square windows evenly along the long side; one: the middle."""

    def __init__(self, crop_size: int, views: int = 1):
        self.crop_size, self.views = crop_size, views

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """uint8 [T, H, W, C] -> uint8 [views, C, T, crop, crop]; nothing is random."""
        height, width = frames.shape[1:3]
        side = min(height, width)
        slack = max(height, width) - side
        # Cutting before resizing: each view is the square of the short side.
        starts = [slack // 2] if self.views == 1 else np.linspace(0, slack, self.views).round().astype(int).tolist()
        size = (self.crop_size, self.crop_size)
        views = []
        for start in starts:
            top, left = (start, 0) if height > width else (0, start)
            views.append(crop_and_resize(frames, top, left, side, side, size).permute(1, 0, 2, 3).contiguous())
        return torch.stack(views)


def random_window(
    height: int, width: int, augmentation: AugConfig, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) with an area and a log-uniform aspect ratio in the ranges, as Inception's crop.

    A window that does not fit is drawn again, ten times at most; then the middle with the nearest allowed aspect ratio.
    """
    low, high = augmentation.random_resize_aspect_ratio
    for _ in range(10):
        area = height * width * rng.uniform(*augmentation.random_resize_scale)
        ratio = np.exp(rng.uniform(np.log(low), np.log(high)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    ratio = min(max(width / height, low), high)
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)
