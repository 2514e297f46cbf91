"""Sizes of clips and of the token grids that they are cut into."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple


class Grid(NamedTuple):
    """Number of tokens along time, height and width.

    Tokens are numbered in time-major order: index = (slot * h + y) * w + x.
    """

    t: int
    h: int
    w: int

    @property
    def num_tokens(self) -> int:
        return self.t * self.h * self.w

    @property
    def tokens_per_frame(self) -> int:
        """Spatial positions, that is, tokens of one time slot."""
        return self.h * self.w


@dataclass(frozen=True)
class ClipShape:
    """Size of a clip and of its tokens.

    Args:
        num_frames: Frames of the clip; 1 for an image.
        crop_size: Pixels, one number for a square or (height, width).
        patch_size: Pixels of a token, one number or (height, width).
        tubelet_size: Frames of a token.

    Example:
        >>> ClipShape(num_frames=16, crop_size=(224, 320), patch_size=16, tubelet_size=2).grid
        Grid(t=8, h=14, w=20)
    """

    num_frames: int
    crop_size: int | tuple[int, int]
    patch_size: int | tuple[int, int] = 16
    tubelet_size: int = 2

    @property
    def height(self) -> int:
        return as_pair(self.crop_size)[0]

    @property
    def width(self) -> int:
        return as_pair(self.crop_size)[1]

    @property
    def grid(self) -> Grid:
        """Token grid; an image has one time slot, whatever the tubelet size.

        Raises:
            ValueError: Patches or tubelets do not divide the clip. The message has the nearest valid size.
        """
        return Grid(1, *self._patches()) if self.num_frames == 1 else self.video_grid

    @property
    def video_grid(self) -> Grid:
        """As `grid`, for models without images: a single frame has to be a multiple of the tubelet size, too."""
        rows, columns = self._patches()
        if self.num_frames < 1 or self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames {self.num_frames} is not divisible by tubelet_size {self.tubelet_size}; the nearest valid "
                f"number is {nearest_multiple(self.num_frames, self.tubelet_size)} (an image can be repeated)"
            )
        return Grid(self.num_frames // self.tubelet_size, rows, columns)

    def as_dict(self) -> dict[str, Any]:
        """Return the four sizes by name, for JSON and keyword arguments."""
        return asdict(self)

    def _patches(self) -> tuple[int, int]:
        patch_height, patch_width = as_pair(self.patch_size)
        if min(self.height, self.width) < 1 or self.height % patch_height or self.width % patch_width:
            nearest = (nearest_multiple(self.height, patch_height), nearest_multiple(self.width, patch_width))
            raise ValueError(
                f"crop_size {_text(self.crop_size)} is not divisible by patch_size {_text(self.patch_size)}; the "
                f"nearest valid size is {_text(nearest)}"
            )
        return self.height // patch_height, self.width // patch_width


@dataclass(frozen=True)
class SoundShape:
    """Size of the sound of a clip.

    Args:
        num_samples: Samples of each channel.
        sample_rate: Samples per second.
        channels: 1 for mono, 2 for stereo.
    """

    num_samples: int
    sample_rate: int
    channels: int = 1

    @property
    def seconds(self) -> float:
        return self.num_samples / self.sample_rate

    def as_dict(self) -> dict[str, int]:
        """Return the three sizes by name, for JSON and keyword arguments."""
        return asdict(self)


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) of a size that is one number for both or already a pair."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def nearest_multiple(number: int, divisor: int) -> int:
    """Return the multiple of `divisor`, at least `divisor` itself, that is nearest to `number`."""
    return max(1, round(number / divisor)) * divisor


def _text(size: int | Sequence[int]) -> str:
    height, width = as_pair(size)
    return str(height) if height == width else f"{height}x{width}"
