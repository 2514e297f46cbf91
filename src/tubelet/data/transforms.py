"""Transforms of the frames of a clip, on uint8. A window is cropped first, and only the window is resized.

A transform takes (frames uint8 [T, H, W, 3], rng) and returns the view `clip`, uint8 [n, 3, T, h, w], or a dict of such
views, for example `{"global": …, "local": …}` for multi-crop objectives. It draws from `rng` only.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torchvision.transforms import v2

from tubelet.config import ConfigError
from tubelet.data.options import AugConfig, ViewOptions
from tubelet.grid import as_pair

Window = tuple[int, int, int, int]  # top, left, height, width
Clips = torch.Tensor | dict[str, torch.Tensor]

# Area as a fraction of the frame's, and aspect ratio, as in timm's random erasing.
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)


class TrainTransform:
    """Random resized crop, flip and the further augmentations of `AugConfig`; the same for all frames of a clip."""

    def __init__(self, augmentation: AugConfig, crop_size: int | tuple[int, int]):
        self.augmentation, self.crop_size = augmentation, as_pair(crop_size)
        if augmentation.rotate90 and self.crop_size[0] != self.crop_size[1]:
            raise ValueError(f"rotate90 needs a square crop_size, not {list(self.crop_size)}")
        self._color: list[torch.nn.Module] = []
        if augmentation.auto_augment:
            ops, magnitude = augmentation.auto_augment_ops, augmentation.auto_augment_magnitude
            self._color.append(v2.RandAugment(ops, magnitude, interpolation=v2.InterpolationMode.BILINEAR))
        if augmentation.color_jitter:
            self._color.append(v2.ColorJitter(*[augmentation.color_jitter] * 3))

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [T, H, W, 3] -> uint8 [1, 3, T, *crop_size]."""
        options = self.augmentation
        height, width = frames.shape[1:3]
        window = random_window(height, width, options.random_resize_scale, options.random_resize_aspect_ratio, rng)
        if options.motion_shift:
            end = random_window(height, width, options.random_resize_scale, options.random_resize_aspect_ratio, rng)
            clip = moving_crop(frames, window, end, self.crop_size)
        else:
            clip = crop(frames, window, self.crop_size)
        if options.horizontal_flip and rng.random() < 0.5:
            clip = clip.flip(-1)
        if options.vertical_flip and rng.random() < 0.5:
            clip = clip.flip(-2)
        if options.rotate90:
            clip = clip.rot90(int(rng.integers(4)), (-2, -1))
        if self._color:
            clip = _with_seed(self._color, clip, int(rng.integers(2**63)))
        clip = clip.permute(1, 0, 2, 3).contiguous()
        if options.reprob and rng.random() < options.reprob:
            erase(clip, rng, options.normalize_mean, options.normalize_std)
        return clip[None]


class MultiViewTransform:
    """Several crops of a clip, each with its own window, flips and colors, as in multi-crop training.

    The clip is decoded once, and each crop reads only its own window and frames.

    Args:
        augmentation: Section `data_aug`.
        crop_size: Pixels of the clips, for views without a size of their own.
        views: Views by name.
        at: Path of `views` in the configuration, for messages.

    Raises:
        ConfigError: An option of a view is invalid.

    Example:
        >>> views = {"global": ViewOptions(count=2), "local": ViewOptions(count=4, crop_size=96)}
        >>> transform = MultiViewTransform(AugConfig(), 224, views)
        >>> [view.shape[0] for view in transform(frames, rng).values()]
        [2, 4]
    """

    def __init__(
        self,
        augmentation: AugConfig,
        crop_size: int | tuple[int, int],
        views: Mapping[str, ViewOptions],
        at: str = "objective.views",
    ):
        self.views = {name: view for name, view in views.items() if view.count}
        self.transforms = {}
        for name, view in self.views.items():
            own = view.augmentation(augmentation, f"{at}.{name}")
            try:
                self.transforms[name] = TrainTransform(own, view.crop_size or crop_size)
            except ValueError as error:
                raise ConfigError(f"  {at}.{name}.data_aug: {error}") from None

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """uint8 [T, H, W, 3] -> name: uint8 [count, 3, T', *crop_size]."""
        crops = {}
        for name, view in self.views.items():
            length = view.num_frames or len(frames)
            starts = rng.integers(len(frames) - length + 1, size=view.count).tolist()
            crops[name] = torch.cat([self.transforms[name](frames[s : s + length], rng) for s in starts])
        return crops


class EvalTransform:
    """The largest crops with the shape of `crop_size`, evenly spaced along the frame, resized to it.

    With a square `crop_size` these are squares of the short side's length, along the long side.

    Args:
        crop_size: Size of the result, one number or (height, width).
        views: Number of crops; a single one is the center crop.
    """

    def __init__(self, crop_size: int | tuple[int, int], views: int = 1):
        self.crop_size, self.views = as_pair(crop_size), views

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """uint8 [T, H, W, 3] -> uint8 [views, 3, T, *crop_size]; deterministic."""
        height, width = frames.shape[1:3]
        rows, columns = self.crop_size
        if height * columns > width * rows:  # a frame taller than the window
            h, w = max(1, round(width * rows / columns)), width
        else:
            h, w = height, max(1, round(height * columns / rows))
        slack = height - h + width - w  # one of the two is zero
        starts = [slack // 2] if self.views == 1 else np.linspace(0, slack, self.views).round().astype(int).tolist()
        windows = [(start, 0, h, w) if height > h else (0, start, h, w) for start in starts]
        return torch.stack([crop(frames, window, self.crop_size).permute(1, 0, 2, 3) for window in windows])


class ShuffledFrames:
    """`transform` of the frames in random order. What remains of a clip is the set of its frames."""

    def __init__(self, transform: Callable[[np.ndarray, np.random.Generator], Clips]):
        self.transform = transform

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> Clips:
        return self.transform(frames[rng.permutation(len(frames))], rng)


def crop(frames: np.ndarray, window: Window, size: int | tuple[int, int]) -> torch.Tensor:
    """Crop a window from uint8 frames [T, H, W, 3] and resize it (bilinear, antialiased) to uint8 [T, 3, *size].

    The result is channels-last in memory, like the frames: torch resizes that layout without leaving uint8.
    """
    top, left, height, width = window
    size = as_pair(size)
    window_pixels = torch.from_numpy(frames[:, top : top + height, left : left + width]).permute(0, 3, 1, 2)
    if (height, width) == size:
        return window_pixels
    return torch.nn.functional.interpolate(window_pixels, size=size, mode="bilinear", antialias=True)


def moving_crop(frames: np.ndarray, start: Window, end: Window, size: tuple[int, int]) -> torch.Tensor:
    """Like `crop`, with a window that moves linearly from `start` to `end` during the clip (motion shift)."""
    windows = np.linspace(start, end, len(frames)).round().astype(int).tolist()
    return torch.cat([crop(frames[t : t + 1], tuple(window), size) for t, window in enumerate(windows)])


def random_window(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Window:
    """Draw the window of a random resized crop, as torchvision's RandomResizedCrop.

    A window that exceeds the frame is drawn again, at most ten times; after that it is the largest centered one with an
    allowed aspect ratio. From Szegedy et al., "Going deeper with convolutions", 2015.

    Args:
        height: Height of the frame.
        width: Width of the frame.
        scale: Range of the window's area as a fraction of the frame's, uniform.
        ratio: Range of its aspect ratio (width / height), log-uniform.
        rng: Source of the draws.
    """
    for _ in range(10):
        area, aspect = height * width * rng.uniform(*scale), np.exp(rng.uniform(*np.log(ratio)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    aspect = np.clip(width / height, *ratio)
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def erase(
    clip: torch.Tensor, rng: np.random.Generator, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """Replace a random box of clip uint8 [3, T, H, W] by noise, in place; the same box in all frames.

    After normalization the noise is standard normal. From Zhong et al., "Random erasing data augmentation", 2020.
    """
    top, left, h, w = random_window(clip.shape[2], clip.shape[3], ERASED_AREA, ERASED_ASPECT, rng)
    noise = torch.from_numpy(rng.standard_normal((3, clip.shape[1], h, w), dtype=np.float32))
    pixels = (noise * torch.tensor(std)[:, None, None, None] + torch.tensor(mean)[:, None, None, None]) * 255
    clip[:, :, top : top + h, left : left + w] = pixels.round().clamp(0, 255).to(torch.uint8)
    return clip


def _with_seed(transforms: list[torch.nn.Module], clip: torch.Tensor, seed: int) -> torch.Tensor:
    """Apply torchvision transforms, which draw from torch's global generator, with `seed`; its state is restored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for transform in transforms:
            clip = transform(clip)
    return clip
