"""Patch embedding of images and clips. With a mask, only the patches of the kept tokens are read and projected."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tubelet.grid import ClipShape, Grid


class PatchEmbed(nn.Module):
    """Patch embedding of images [B, C, H, W]; token index = y*w + x.

    Args:
        patch_size: Side of a patch in pixels.
        in_chans: Number of input channels C.
        embed_dim: Width D of the tokens.
    """

    def __init__(self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Return all tokens [B, N, D], or those with the indices `keep` [B, K] as [B, K, D]."""
        p, q = self.proj.kernel_size
        patches = rearrange(x, "B C (h p) (w q) -> B h w C p q", p=p, q=q)
        if keep is None:
            return _project(patches.flatten(1, 2), self.proj)
        w = patches.shape[2]
        return _project(patches[_batch_index(keep), keep // w, keep % w], self.proj)


class PatchEmbed3D(nn.Module):
    """Tubelet embedding of clips [B, C, T, H, W]; token index = (t*h + y)*w + x.

    Args:
        patch_size: Side of a patch in pixels.
        tubelet_size: Frames per token.
        in_chans: Number of input channels C.
        embed_dim: Width D of the tokens.
    """

    def __init__(self, patch_size: int = 16, tubelet_size: int = 2, in_chans: int = 3, embed_dim: int = 768):
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, size, size)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Return all tokens [B, N, D], or those with the indices `keep` [B, K] as [B, K, D]."""
        s, p, q = self.proj.kernel_size
        # A view; indexing it copies only the kept patches.
        patches = rearrange(x, "B C (t s) (h p) (w q) -> B t h w C s p q", s=s, p=p, q=q)
        if keep is None:
            return _project(patches.flatten(1, 3), self.proj)
        h, w = patches.shape[2:4]
        return _project(patches[_batch_index(keep), keep // (h * w), keep // w % h, keep % w], self.proj)


class ClipEmbed(PatchEmbed3D):
    """Tubelet embedding for encoders that take clips as [B, C, T, H, W] or [B, T, C, H, W].

    The layout is recognized by the dimension of size `in_chans`; if both match, it is [B, C, T, H, W].
    """

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Return the token grid (t, h, w) of a clip.

        Raises:
            ValueError: If the tubelet or patch size does not divide the clip size.
        """
        tubelet_size, patch_size, _ = self.proj.kernel_size
        return ClipShape(num_frames, (height, width), patch_size, tubelet_size).video_grid

    def frames_first(self, video: torch.Tensor) -> bool:
        """Return True for [B, T, C, H, W] and False for [B, C, T, H, W].

        Raises:
            ValueError: If neither dimension has the size `in_chans`.
        """
        channels = self.proj.in_channels
        if video.ndim != 5 or channels not in video.shape[1:3]:
            raise ValueError(
                f"this encoder takes clips [B, {channels}, T, H, W] or [B, T, {channels}, H, W], not "
                f"{list(video.shape)}; set in_chans for another number of channels"
            )
        return video.shape[1] != channels

    def channels_first(self, video: torch.Tensor) -> torch.Tensor:
        """Return the clips as [B, C, T, H, W]."""
        return video.transpose(1, 2) if self.frames_first(video) else video


def _batch_index(keep: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(keep), device=keep.device)[:, None]


def _project(patches: torch.Tensor, conv: nn.Conv2d | nn.Conv3d) -> torch.Tensor:
    """Apply the convolution to extracted patches: [B, K, C, ...] -> [B, K, D].

    A convolution of patches that do not overlap is a matrix product, which is the faster kernel in low precision.
    """
    return F.linear(patches.flatten(2), conv.weight.flatten(1), conv.bias)
