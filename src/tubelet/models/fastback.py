"""FastBack: lookback and lookahead attention heads, and a learned CLS frame before and after the clip."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tubelet.grid import Grid
from tubelet.layers import MLP, Attention, PatchEmbed3D
from tubelet.layers.attention import AttentionFn
from tubelet.layers.groups import tube_grid
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.pattern_attention import pattern_attention
from tubelet.layers.patterns import Lookahead, Lookback
from tubelet.layers.positions import Positions
from tubelet.models.video_encoder import VideoEncoder


class BidirectionalTemporalAttention(Attention):
    """Self-attention of F frames of P patches, [B, F, P, D] -> [B, F, P, D], with a temporal direction for each head.

    Args:
        embed_dim: Width D of the tokens.
        num_heads: Number of attention heads; must divide `embed_dim`.
        lookback_heads: Heads that attend to the current and earlier frames; they come first.
        lookahead_heads: Heads that attend to the current and later frames.
        frame_size: Patches per frame P.
        block_size: Block size of FlexAttention's mask in tokens.
        dropout: Dropout probability of the output.

    Raises:
        ValueError: If the heads do not add up to `num_heads`, or `num_heads` does not divide `embed_dim`.
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

    def forward(self, x: Tensor, attend: AttentionFn | None = None) -> Tensor:  # type: ignore[override]  # no rotary tables
        """Mix frames [B, F, P, D], or any tokens [B, N, D] with the attention function that `attention_fn` returns."""
        if attend is not None:
            return super().forward(x, attend=attend)
        if x.ndim != 4 or x.shape[2] != self.frame_size:
            raise ValueError(f"frames [B, F, {self.frame_size}, D] expected, not {list(x.shape)}; see frame_size")
        attend = self.attention_fn(None, Grid(x.shape[1], self.frame_size, 1), x.device)
        return super().forward(x.flatten(1, 2), attend=attend).view_as(x)

    def attention_fn(
        self, keep: Tensor | None, grid: Grid, device: torch.device, frame_sizes: Sequence[int] | None = None
    ) -> AttentionFn:
        """Return the attention function, which blocks with the same heads can share.

        Args:
            keep: Indices [B, K] of the kept tokens; all tokens if None.
            grid: Token grid (t, h, w).
            device: Device of the tokens.
            frame_sizes: Number of tokens of each frame in `keep`, if they are sorted by frame; unknown if None.
        """
        return pattern_attention(
            self.heads, grid, keep, device, self.head_dim, self.block_size, frame_sizes=frame_sizes
        )


class BTTransformerBlock(nn.Module):
    """Pre-norm block of BidirectionalTemporalAttention and an MLP: [B, F, P, D] -> [B, F, P, D].

    Args:
        ff_hidden_dim: Hidden width of the MLP.
        dropout: Dropout probability after the attention projection and in the MLP.

    The other arguments are those of `BidirectionalTemporalAttention`.
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

    def forward(self, x: Tensor, attend: AttentionFn | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), attend)
        return x + self.mlp(self.norm2(x))


class AddCLSFrames(nn.Module):
    """Add a learned CLS frame before and after the clip: [B, F, P, D] -> [B, F + 2, P, D].

    Args:
        embed_dim: Width D of the tokens.
        frame_size: Patches per frame P.
    """

    def __init__(self, embed_dim: int, frame_size: int):
        super().__init__()
        self.frames = nn.Parameter(torch.empty(2, frame_size, embed_dim))
        nn.init.trunc_normal_(self.frames, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.frames.shape[1:]:
            raise ValueError(f"frames [B, F, {', '.join(map(str, self.frames.shape[1:]))}] expected, not {[*x.shape]}")
        first, last = self.frames[:, None, None].expand(-1, len(x), -1, -1, -1)
        return torch.cat([first, x, last], dim=1)

    def resized(self, configured: Grid, grid: Grid) -> Tensor:
        """Return the two CLS frames [2, h*w, D], interpolated bicubically if `grid` is not the configured one."""
        if configured[1:] == grid[1:]:
            return self.frames
        images = rearrange(self.frames, "ends (h w) D -> ends D h w", h=configured[1])
        resized = F.interpolate(images, size=grid[1:], mode="bicubic")
        return rearrange(resized, "ends D h w -> ends (h w) D")


class CLSPooling(nn.Module):
    """Project the mean patches of the first and the last frame to one vector: [B, F, P, D] -> [B, D]."""

    def __init__(self, embed_dim: int):
        super().__init__()
        self.proj = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([x[:, 0].mean(1), x[:, -1].mean(1)], dim=1))


class BTTransformer(VideoEncoder):
    """Bidirectional temporal transformer: the tokens of a clip between two CLS frames, with fixed sin-cos positions.

    The head reads CLSPooling of the CLS frames. With masks, attention restricts kept tokens by their frames in the same
    way, and the CLS frames are always complete.

    Args:
        img_size: Frame size in pixels: the side of a square or (height, width).
        patch_size: Side of a patch in pixels.
        num_frames: Frames per clip.
        tubelet_size: Frames per token.
        in_chans: Channels of the video.
        embed_dim: Width D of the tokens.
        depth: Number of transformer blocks.
        num_heads: Attention heads per block; must divide `embed_dim`.
        lookback_heads: Heads that attend to the current and earlier frames, the others to the current and later ones;
            half of the heads if None.
        mlp_ratio: Hidden width of the MLP divided by `embed_dim`.
        block_size: Block size of FlexAttention's mask in tokens (GPU only).
        drop_rate: Dropout probability after attention projections and in MLPs.
        num_classes: Classes of a linear head; 0 for no head, so that the encoder returns tokens.
        init_std: Standard deviation of the initial weights (truncated normal).
        uniform_power: Give time, row and column a third of the channels of the sin-cos position embeddings each;
            by default they get 1/2, 1/4 and 1/4.
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If sizes or numbers of heads are incompatible.

    Example:
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
        uniform_power: bool = True,
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
        frame_size = self.grid.tokens_per_frame
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
        frame_sizes = None
        if keep is not None:
            if self.tube_masks:
                frame_sizes = [h * w, *[tube_grid(keep, grid)[1]] * t, h * w]
            # Token indices in the clip that the two CLS frames extend.
            frame = torch.arange(h * w, device=x.device).expand(len(x), -1)
            keep = torch.cat([frame, keep + h * w, frame + (t + 1) * h * w], dim=1)
        attention = cast(BidirectionalTemporalAttention, self.blocks[0].attn)  # all blocks have the same heads
        attend = attention.attention_fn(keep, Grid(t + 2, h, w), x.device, frame_sizes)
        for block in self.blocks:
            x = self.run(block, x, attend)
        first, x, last = self.norm(x).split([h * w, x.shape[1] - 2 * h * w, h * w], dim=1)
        return x, None if self.pool is None else self.pool(torch.stack([first, last], dim=1))


SIZES: dict[str, dict[str, Any]] = {
    "fastback_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 4},
    "fastback_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "fastback_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Factories accept all keyword arguments of BTTransformer, which override the preset.
fastback_tiny = partial(BTTransformer, **SIZES["fastback_tiny"])
fastback_small = partial(BTTransformer, **SIZES["fastback_small"])
fastback_base = partial(BTTransformer, **SIZES["fastback_base"])
