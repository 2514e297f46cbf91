"""What is done to the frames of a clip, on uint8: a window is cut out first, then only the window is resized."""

import numpy as np
import torch
from torchvision.transforms import v2

from tubelet.data import AugConfig

Window = tuple[int, int, int, int]  # top, left, height, width

ERASED_AREA = (0.02, 1 / 3)  # share of the frame; with the aspect ratios, timm's random erasing
ERASED_ASPECT = (0.3, 1 / 0.3)


class TrainTransform:
    """Random resized crop and flip, and what `AugConfig` asks for beyond; the same for all frames of a clip."""

    def __init__(self, augmentation: AugConfig, crop_size: int):
        self.augmentation, self.crop_size = augmentation, crop_size
        self._colour: list[torch.nn.Module] = []
        if augmentation.auto_augment:
            ops, magnitude = augmentation.auto_augment_ops, augmentation.auto_augment_magnitude
            self._colour.append(v2.RandAugment(ops, magnitude, interpolation=v2.InterpolationMode.BILINEAR))
        if augmentation.color_jitter:
            self._colour.append(v2.ColorJitter(*[augmentation.color_jitter] * 3))

    def __call__(self, frames: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
        """uint8 [T, H, W, 3] -> uint8 [1, 3, T, crop, crop], one view."""
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
        if self._colour:
            clip = _with_seed(self._colour, clip, int(rng.integers(2**63)))
        clip = clip.permute(1, 0, 2, 3).contiguous()
        if options.reprob and rng.random() < options.reprob:
            erase(clip, rng, options.normalize_mean, options.normalize_std)
        return clip[None]


class EvalTransform:
    """Square windows of the short side's length, evenly along the long side (one: the middle), resized to crop_size."""

    def __init__(self, crop_size: int, views: int = 1):
        self.crop_size, self.views = crop_size, views

    def __call__(self, frames: np.ndarray, rng: np.random.Generator | None = None) -> torch.Tensor:
        """uint8 [T, H, W, 3] -> uint8 [views, 3, T, crop, crop]; nothing is random."""
        height, width = frames.shape[1:3]
        side, slack = min(height, width), abs(height - width)
        starts = [slack // 2] if self.views == 1 else np.linspace(0, slack, self.views).round().astype(int).tolist()
        windows = [(start, 0, side, side) if height > width else (0, start, side, side) for start in starts]
        return torch.stack([crop(frames, window, self.crop_size).permute(1, 0, 2, 3) for window in windows])


def crop(frames: np.ndarray, window: Window, size: int) -> torch.Tensor:
    """The window of uint8 frames [T, H, W, 3], resized (bilinear, antialiased), as uint8 [T, 3, size, size].

    The result lies channels last in memory, like the frames: torch resizes that layout without leaving uint8.
    """
    top, left, height, width = window
    cut = torch.from_numpy(frames[:, top : top + height, left : left + width]).permute(0, 3, 1, 2)
    if (height, width) == (size, size):
        return cut
    return torch.nn.functional.interpolate(cut, size=(size, size), mode="bilinear", antialias=True)


def moving_crop(frames: np.ndarray, start: Window, end: Window, size: int) -> torch.Tensor:
    """Like `crop`, with a window that goes in a straight line from `start` to `end` during the clip (motion shift)."""
    windows = np.linspace(start, end, len(frames)).round().astype(int).tolist()
    return torch.cat([crop(frames[t : t + 1], tuple(window), size) for t, window in enumerate(windows)])


def random_window(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Window:
    """A window with an area (share of the frame) in `scale` and a log-uniform aspect ratio (width / height) in `ratio`.

    One that does not fit is drawn again, ten times at most; then it is the largest in the middle with an allowed ratio.
    Inception's crop (Szegedy et al., "Going deeper with convolutions", 2015), as torchvision's RandomResizedCrop.
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
    """Noise in place of a random box of clip uint8 [3, T, H, W], the same box in all frames; in place.

    Zhong et al., "Random erasing data augmentation", 2020. After normalisation the noise is that of a standard normal.
    """
    top, left, h, w = random_window(clip.shape[2], clip.shape[3], ERASED_AREA, ERASED_ASPECT, rng)
    noise = torch.from_numpy(rng.standard_normal((3, clip.shape[1], h, w), dtype=np.float32))
    colours = (noise * torch.tensor(std)[:, None, None, None] + torch.tensor(mean)[:, None, None, None]) * 255
    clip[:, :, top : top + h, left : left + w] = colours.round().clamp(0, 255).to(torch.uint8)
    return clip


def _with_seed(transforms: list[torch.nn.Module], clip: torch.Tensor, seed: int) -> torch.Tensor:
    """torchvision draws from torch's global generator: seeded for the clip, and left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for transform in transforms:
            clip = transform(clip)
    return clip
