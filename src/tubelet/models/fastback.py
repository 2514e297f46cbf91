"""FastBack: some heads look back in time, the others ahead, and a learned frame at either end gathers the clip."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tubelet.layers import MLP, Attention, PatchEmbed3D
from tubelet.layers.attention import Attend
from tubelet.layers.groups import grid_of_tubes
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.pattern_attention import attention_under
from tubelet.layers.patterns import Lookahead, Lookback
from tubelet.layers.positions import Grid, Positions
from tubelet.models.video_encoder import VideoEncoder


class BidirectionalTemporalAttention(Attention):
    """Self-attention of frames [B, F, P, D] -> [B, F, P, D].

    The first `lookback_heads` heads see the current and earlier frames, the `lookahead_heads` others the current and
    later ones, all patches of a frame alike. `block_size` is that of FlexAttention's block-sparse mask, `dropout` acts
    on the output. Raises ValueError when the heads do not add up to `num_heads`, or a frame has another number of
    patches than `frame_size`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        lookback_heads: int,
        lookahead_heads: int,
        frame_size: int,
        block_size: int = 128,
        dropout: float = 0.0,
    ):
        if min(lookback_heads, lookahead_heads) < 0 or lookback_heads + lookahead_heads != num_heads:
            raise ValueError(
                f"lookback_heads {lookback_heads} and lookahead_heads {lookahead_heads} "
                f"must add up to num_heads {num_heads}"
            )
        super().__init__(embed_dim, num_heads, qkv_bias=True, proj_drop=dropout)
        self.heads = (Lookback(),) * lookback_heads + (Lookahead(),) * lookahead_heads
        self.frame_size = frame_size
        self.block_size = block_size

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        """Frames [B, F, P, D]; or any tokens [B, N, D] together with the attention `attend_among` them."""
        if attend is not None:
            return super().forward(x, attend=attend)
        if x.ndim != 4 or x.shape[2] != self.frame_size:
            raise ValueError(f"frames [B, F, {self.frame_size}, D] expected, not {list(x.shape)}; see frame_size")
        attend = self.attend_among(None, (x.shape[1], self.frame_size, 1), x)
        return super().forward(x.flatten(1, 2), attend=attend).view_as(x)

    def attend_among(
        self, keep: Tensor | None, grid: Grid, like: Tensor, frames: Sequence[int] | None = None
    ) -> Attend:
        """Attention of all tokens of the grid, or of `keep` [B, K]; to be shared by blocks with the same heads.

        `frames` may say how many tokens of each frame are kept, where they come frame by frame.
        """
        return attention_under(self.heads, grid, keep, like, self.head_dim, self.block_size, frames=frames)


class BTTransformerBlock(nn.Module):
    """x + attention(norm x), then x + mlp(norm x): [B, F, P, D] -> [B, F, P, D].

    Arguments as for BidirectionalTemporalAttention; the feed-forward layer is `ff_hidden_dim` wide.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        lookback_heads: int,
        lookahead_heads: int,
        frame_size: int,
        ff_hidden_dim: int,
        block_size: int = 128,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = BidirectionalTemporalAttention(
            embed_dim, num_heads, lookback_heads, lookahead_heads, frame_size, block_size, dropout
        )
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim, ff_hidden_dim, drop=dropout)

    def forward(self, x: Tensor, attend: Attend | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


class AddCLSFrames(nn.Module):
    """A learned frame before the clip and one after it: [B, F, P, D] -> [B, F + 2, P, D], P = `frame_size`."""

    def __init__(self, embed_dim: int, frame_size: int):
        super().__init__()
        self.frames = nn.Parameter(torch.empty(2, frame_size, embed_dim))
        nn.init.trunc_normal_(self.frames, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.frames.shape[1:]:
            raise ValueError(f"frames [B, F, {', '.join(map(str, self.frames.shape[1:]))}] expected, not {[*x.shape]}")
        first, last = self.frames[:, None, None].expand(-1, len(x), -1, -1, -1)
        return torch.cat([first, x, last], dim=1)

    def resized(self, own: Grid, grid: Grid) -> Tensor:
        """The two frames [2, h*w, D] for another grid than their own; bicubic."""
        if own[1:] == grid[1:]:
            return self.frames
        frames = rearrange(self.frames, "ends (h w) D -> ends D h w", h=own[1])
        frames = F.interpolate(frames, size=grid[1:], mode="bicubic")
        return rearrange(frames, "ends D h w -> ends (h w) D")


class CLSPooling(nn.Module):
    """The first and the last frame, each averaged over its patches, mapped to one vector: [B, F, P, D] -> [B, D]."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.proj = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([x[:, 0].mean(1), x[:, -1].mean(1)], dim=1))


class BTTransformer(VideoEncoder):
    """Tokens of a clip, between two CLS frames, through `depth` BTTransformerBlocks.

    Half of the heads look back (`lookback_heads`, by default num_heads // 2), the others ahead. With `num_classes` the
    head reads CLSPooling of the CLS frames. Positions are fixed sin-cos. Where only some tokens are kept, attention has
    the same predicate on their frames, and the CLS frames stay whole. Raises ValueError for sizes that do not fit.

    >>> encoder = BTTransformer(img_size=64, num_frames=8, embed_dim=192, num_heads=4)
    >>> clips = torch.randn(2, 3, 8, 64, 64)
    >>> encoder(clips).shape, encoder(clips, torch.tensor([[0, 5, 9], [1, 2, 3]])).shape
    (torch.Size([2, 64, 192]), torch.Size([2, 3, 192]))
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 16,
        tubelet_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        lookback_heads: int | None = None,
        mlp_ratio: float = 4.0,
        block_size: int = 128,
        drop_rate: float = 0.0,
        num_classes: int = 0,
        init_std: float = 0.02,
        uniform_power: bool = False,
        use_activation_checkpointing: bool = False,
    ):
        super().__init__(
            img_size,
            patch_size,
            num_frames,
            tubelet_size,
            embed_dim,
            num_heads,
            num_classes,
            use_activation_checkpointing,
        )
        lookback = num_heads // 2 if lookback_heads is None else lookback_heads
        frame_size = self.grid[1] * self.grid[2]
        self.patch_embed = PatchEmbed3D(patch_size, tubelet_size, in_chans, embed_dim)
        self.positions = Positions(embed_dim, num_heads, self.grid, True, uniform_power)
        self.cls_frames = AddCLSFrames(embed_dim, frame_size)
        self.blocks = nn.ModuleList(
            BTTransformerBlock(
                embed_dim,
                num_heads,
                lookback,
                num_heads - lookback,
                frame_size,
                int(embed_dim * mlp_ratio),
                block_size,
                drop_rate,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.pool = CLSPooling(embed_dim) if num_classes else None
        init_weights(self, init_std)
        rescale_blocks(self.blocks)

    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
        t, h, w = grid
        x = self.positions.add(self.patch_embed(video, keep), keep, grid)
        first, last = self.cls_frames.resized(self.grid, grid)[:, None].expand(-1, len(x), -1, -1)
        x = torch.cat([first, x, last], dim=1)
        frames = None
        if keep is not None:
            if self.tube_masks:
                frames = [h * w, *[grid_of_tubes(keep, grid)[1]] * t, h * w]
            # As indices of a clip that is longer by the two frames.
            frame = torch.arange(h * w, device=x.device).expand(len(x), -1)
            keep = torch.cat([frame, keep + h * w, frame + (t + 1) * h * w], dim=1)
        attend = self.blocks[0].attn.attend_among(keep, (t + 2, h, w), x, frames)
        for block in self.blocks:
            x = self.run(block, x, attend)
        first, x, last = self.norm(x).split([h * w, x.shape[1] - 2 * h * w, h * w], dim=1)
        return x, None if self.pool is None else self.pool(torch.stack([first, last], dim=1))


SIZES = {
    "fastback_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 4},
    "fastback_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "fastback_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Each takes the keyword arguments of BTTransformer; what is given overrides the size.
fastback_tiny = partial(BTTransformer, **SIZES["fastback_tiny"])
fastback_small = partial(BTTransformer, **SIZES["fastback_small"])
fastback_base = partial(BTTransformer, **SIZES["fastback_base"])
