"""Pixels to tokens. Where only some tokens are kept, only their patches are read and multiplied."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from tubelet.layers.checks import token_grid
from tubelet.layers.positions import Grid


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] -> tokens [B, N, D], or [B, K, D] for `keep` [B, K]; index = y*w + x."""

    def __init__(self, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        if keep is None:
            return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # else all norms that follow copy it
        p, q = self.proj.kernel_size
        patches = rearrange(x, "B C (h p) (w q) -> B h w C p q", p=p, q=q)
        w = patches.shape[2]
        return _project(patches[_clip_index(keep), keep // w, keep % w], self.proj)


class PatchEmbed3D(nn.Module):
    """Videos [B, C, T, H, W] -> tokens [B, N, D], or [B, K, D] for `keep` [B, K]; index = (τ*h + y)*w + x."""

    def __init__(self, patch_size: int = 16, tubelet_size: int = 2, in_chans: int = 3, embed_dim: int = 768):
        super().__init__()
        size = (tubelet_size, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, size, size)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        if keep is None:
            return self.proj(x).flatten(2).transpose(1, 2).contiguous()  # else all norms that follow copy it
        s, p, q = self.proj.kernel_size
        # A view: indexing it copies the kept patches alone.
        patches = rearrange(x, "B C (t s) (h p) (w q) -> B t h w C s p q", s=s, p=p, q=q)
        h, w = patches.shape[2:4]
        return _project(patches[_clip_index(keep), keep // (h * w), keep // w % h, keep % w], self.proj)


class ClipEmbed(PatchEmbed3D):
    """Tokens of clips that may come with channels first, [B, C, T, H, W], or with frames first, [B, T, C, H, W].

    The axis that has as many entries as there are channels decides; where both have, channels come first.
    """

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along time, rows and columns of a clip; ValueError where patches or tubelets do not fill it."""
        tubelet_size, patch_size, _ = self.proj.kernel_size
        return token_grid(num_frames, height, width, tubelet_size, patch_size)

    def frames_first(self, video: torch.Tensor) -> bool:
        """Whether frames come before channels; ValueError where neither axis holds the channels."""
        channels = self.proj.in_channels
        if video.ndim != 5 or channels not in video.shape[1:3]:
            raise ValueError(
                f"this encoder takes clips [B, {channels}, T, H, W] or [B, T, {channels}, H, W], not "
                f"{list(video.shape)}; set in_chans for another number of channels"
            )
        return video.shape[1] != channels

    def channels_first(self, video: torch.Tensor) -> torch.Tensor:
        """The clips as [B, C, T, H, W]."""
        return video.transpose(1, 2) if self.frames_first(video) else video


def _clip_index(keep: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(keep), device=keep.device)[:, None]


def _project(patches: torch.Tensor, conv: nn.Conv2d | nn.Conv3d) -> torch.Tensor:
    """The convolution on patches cut out beforehand, [B, K, C, ...] -> [B, K, D]."""
    return F.linear(patches.flatten(2), conv.weight.flatten(1), conv.bias)
