"""Two-path encoder in the manner of SlowFast: a wide path over few frames and a narrow path over all frames."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.grid import Grid
from tubelet.layers import Block, PatchEmbed3D
from tubelet.layers.attention import attention
from tubelet.layers.checks import head_width
from tubelet.layers.groups import tube_grid
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.positions import Positions
from tubelet.models.video_encoder import VideoEncoder


class Lateral(nn.Module):
    """Lateral connection: residual cross-attention to the tokens of the other path.

    Args:
        dim: Width D of the tokens.
        context_dim: Width C of the tokens of the other path.
        num_heads: Number of attention heads; must divide `dim`.
    """

    def __init__(self, dim: int, context_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_width(dim, num_heads)
        self.norm_x = nn.LayerNorm(dim, eps=1e-6)
        self.norm_context = nn.LayerNorm(context_dim, eps=1e-6)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Add the attention output to the tokens.

        Args:
            x: Tokens [B, n, D].
            context: Tokens of the other path [B, N, C].
            mask: Bool [B, 1, 1, N], False for padding in `context`; None if there is no padding.

        Returns:
            Tokens [B, n, D].
        """
        q = self.q(self.norm_x(x)).unflatten(2, (self.num_heads, self.head_dim))
        k, v = self.kv(self.norm_context(context)).unflatten(2, (2, self.num_heads, self.head_dim)).unbind(2)
        y = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return x + self.proj(y.transpose(1, 2).flatten(2))


class MultiscaleTransformer(VideoEncoder):
    """Transformer with a wide slow path over every `frame_stride`-th temporal index and a narrow fast path over all.

    The design follows "SlowFast Networks for Video Recognition" (Feichtenhofer et al. 2019), with a transformer for
    each path and lateral cross-attention in both directions after every `lateral_every` blocks. At the end, the tokens
    of the fast path are projected to `embed_dim` and attend to the slow path. They are the output, one token for each
    position of the grid. Position embeddings are fixed sin-cos.

    With masks, the slow path keeps the tokens of its temporal indices. Its CLS token ensures that there is always a key
    to attend to. The number of kept tokens is read back from the masks, which breaks the graph of torch.compile and
    synchronizes with the GPU, unless `tube_masks` is set.

    Args:
        img_size: Frame size in pixels: the side of a square or (height, width).
        patch_size: Side of a patch in pixels.
        num_frames: Frames per clip.
        tubelet_size: Frames per token.
        in_chans: Channels of the video.
        embed_dim: Width D of the slow path and of the output tokens.
        depth: Number of transformer blocks in each path.
        num_heads: Attention heads of the slow path; must divide `embed_dim`.
        fast_embed_dim: Width of the fast path.
        fast_num_heads: Attention heads of the fast path; must divide `fast_embed_dim`.
        frame_stride: The slow path takes every `frame_stride`-th temporal index.
        lateral_every: Number of blocks between lateral connections.
        mlp_ratio: Hidden width of the MLPs divided by the width of their path.
        drop_rate: Dropout probability after attention projections and in MLPs.
        num_classes: Classes of a linear head; 0 for no head, so that the encoder returns tokens.
        init_std: Standard deviation of the initial weights (truncated normal).
        uniform_power: Give time, row and column a third of the channels of the sin-cos position embeddings each;
            by default they get 1/2, 1/4 and 1/4.
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If sizes are incompatible.

    Example:
        >>> encoder = MultiscaleTransformer(64, 16, 8, embed_dim=192, num_heads=3, fast_embed_dim=96, fast_num_heads=3)
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
        fast_embed_dim: int = 192,
        fast_num_heads: int = 3,
        frame_stride: int = 4,
        lateral_every: int = 3,
        mlp_ratio: float = 4.0,
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
        for name, value in {"frame_stride": frame_stride, "lateral_every": lateral_every}.items():
            if value < 1:
                raise ValueError(f"{name} {value}: must be an integer, at least 1")
        self.frame_stride = frame_stride
        self.lateral_every = lateral_every
        norm_layer = partial(nn.LayerNorm, eps=1e-6)

        def path(dim: int, heads: int) -> tuple[PatchEmbed3D, Positions, nn.ModuleList]:
            return (
                PatchEmbed3D(patch_size, tubelet_size, in_chans, dim),
                Positions(dim, heads, self.grid, True, uniform_power),
                nn.ModuleList(
                    Block(dim, heads, mlp_ratio, qkv_bias=True, drop=drop_rate, norm_layer=norm_layer)
                    for _ in range(depth)
                ),
            )

        self.slow_patch_embed, self.slow_positions, self.slow_blocks = path(embed_dim, num_heads)
        self.fast_patch_embed, self.fast_positions, self.fast_blocks = path(fast_embed_dim, fast_num_heads)
        num_laterals = depth // lateral_every
        self.to_slow = nn.ModuleList(Lateral(embed_dim, fast_embed_dim, num_heads) for _ in range(num_laterals))
        self.to_fast = nn.ModuleList(Lateral(fast_embed_dim, embed_dim, fast_num_heads) for _ in range(num_laterals))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        self.widen = nn.Linear(fast_embed_dim, embed_dim)
        self.readout = Lateral(embed_dim, embed_dim, num_heads)
        self.norm = norm_layer(embed_dim)
        init_weights(self, init_std)
        rescale_blocks(self.slow_blocks)
        rescale_blocks(self.fast_blocks)

    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        fast = self.fast_positions.add(self.fast_patch_embed(video, keep), keep, grid)
        index, slow_mask = self._slow_tokens(keep, grid, video)
        slow = self.slow_positions.add(self.slow_patch_embed(video, index), index, grid)
        slow = torch.cat([self.cls_token.expand(len(slow), -1, -1), slow], dim=1)
        attend = partial(F.scaled_dot_product_attention, attn_mask=slow_mask)

        for layer, (slow_block, fast_block) in enumerate(zip(self.slow_blocks, self.fast_blocks, strict=True), start=1):
            slow, fast = self.run(slow_block, slow, None, attend), self.run(fast_block, fast)
            if layer % self.lateral_every == 0:
                lateral = layer // self.lateral_every - 1
                slow, fast = self.to_slow[lateral](slow, fast), self.to_fast[lateral](fast, slow, slow_mask)
        x = self.norm(self.readout(self.widen(fast), slow, slow_mask))
        return x, x.mean(1)

    def _slow_tokens(self, keep: Tensor | None, grid: Grid, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """Select the tokens of the slow path.

        Args:
            keep: Indices [B, K] of the kept tokens; all tokens if None.
            grid: Token grid (t, h, w).
            video: Clips, for their number and device.

        Returns:
            Indices [B, n] of the tokens, and a mask [B, 1, 1, 1 + n] over the CLS token and these. Clips may keep
            different numbers of them: shorter lists are padded with other tokens, for which the mask is False. The mask
            is None without padding.
        """
        t, h, w = grid
        if keep is None:
            index = torch.arange(t * h * w, device=video.device).view(t, -1)[:: self.frame_stride].flatten()
            return index.expand(len(video), -1), None
        if self.tube_masks:  # all clips keep equally many
            t, s, _ = tube_grid(keep, grid)
            return keep.unflatten(1, (t, s))[:, :: self.frame_stride].flatten(1), None
        is_slow = keep // (h * w) % self.frame_stride == 0
        order = is_slow.int().argsort(dim=1, descending=True, stable=True)[:, : int(is_slow.sum(1).max())]
        mask = F.pad(is_slow.gather(1, order), (1, 0), value=True)
        return keep.gather(1, order), mask[:, None, None]


SIZES: dict[str, dict[str, Any]] = {
    "multiscale_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "fast_embed_dim": 96, "fast_num_heads": 3},
    "multiscale_small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "fast_embed_dim": 96, "fast_num_heads": 3},
    "multiscale_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "fast_embed_dim": 192, "fast_num_heads": 3},
}

# Factories accept all keyword arguments of MultiscaleTransformer, which override the preset.
multiscale_tiny = partial(MultiscaleTransformer, **SIZES["multiscale_tiny"])
multiscale_small = partial(MultiscaleTransformer, **SIZES["multiscale_small"])
multiscale_base = partial(MultiscaleTransformer, **SIZES["multiscale_base"])
