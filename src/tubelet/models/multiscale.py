"""Two paths: a wide one over few time slots, a narrow one over all; they read each other by cross-attention."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.layers import Block, PatchEmbed3D
from tubelet.layers.checks import head_width
from tubelet.layers.groups import grid_of_tubes
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.positions import Grid, Positions
from tubelet.models.video_encoder import VideoEncoder


class Lateral(nn.Module):
    """x [B, n, D] + what it reads from the other path's tokens [B, N, C] -> [B, n, D].

    `readable`, bool [B, 1, 1, N] or None, is true for the tokens that there are.
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

    def forward(self, x: Tensor, context: Tensor, readable: Tensor | None = None) -> Tensor:
        q = self.q(self.norm_x(x)).unflatten(2, (self.num_heads, self.head_dim))
        k, v = self.kv(self.norm_context(context)).unflatten(2, (2, self.num_heads, self.head_dim)).unbind(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=readable)
        return x + self.proj(y.transpose(1, 2).flatten(2))


class MultiscaleTransformer(VideoEncoder):
    """A slow path, `embed_dim` wide over every `frame_stride`-th time slot, and a fast one, narrow over all of them.

    The division of labour of "SlowFast Networks for Video Recognition" (Feichtenhofer et al. 2019), with transformers
    for both paths, and cross-attention both ways after every `lateral_every` blocks. At the end each token of the fast
    path, widened, reads the slow path: these are the returned tokens [B, N, embed_dim], one for each place of the whole
    grid. The slow path has a CLS token as well, so that there is something to read whichever tokens are kept; of kept
    tokens it takes those of its time slots. How many these are is read back from the masks, which breaks
    torch.compile's graph and waits for a GPU, unless `tube_masks` is set. Positions are fixed sin-cos. Raises
    ValueError for sizes that do not fit.

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
        for name, value in {"frame_stride": frame_stride, "lateral_every": lateral_every}.items():
            if value < 1:
                raise ValueError(f"{name} {value}: give a whole number, at least 1")
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
        exchanges = depth // lateral_every
        self.to_slow = nn.ModuleList(Lateral(embed_dim, fast_embed_dim, num_heads) for _ in range(exchanges))
        self.to_fast = nn.ModuleList(Lateral(fast_embed_dim, embed_dim, fast_num_heads) for _ in range(exchanges))
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
        index, readable = self._slow_tokens(keep, grid, video)
        slow = self.slow_positions.add(self.slow_patch_embed(video, index), index, grid)
        slow = torch.cat([self.cls_token.expand(len(slow), -1, -1), slow], dim=1)
        attend = partial(F.scaled_dot_product_attention, attn_mask=readable)

        for layer, (slow_block, fast_block) in enumerate(zip(self.slow_blocks, self.fast_blocks, strict=True), start=1):
            slow, fast = self.run(slow_block, slow, None, attend), self.run(fast_block, fast)
            if layer % self.lateral_every == 0:
                exchange = layer // self.lateral_every - 1
                slow, fast = self.to_slow[exchange](slow, fast), self.to_fast[exchange](fast, slow, readable)
        x = self.norm(self.readout(self.widen(fast), slow, readable))
        return x, x.mean(1)

    def _slow_tokens(self, keep: Tensor | None, grid: Grid, video: Tensor) -> tuple[Tensor, Tensor | None]:
        """Indices [B, K] of the slow path's tokens, and which of its CLS token and these there are, [B, 1, 1, 1 + K].

        Clips may keep different numbers of them: the shorter lists end in tokens that must not be read (None: none do).
        """
        t, h, w = grid
        if keep is None:
            index = torch.arange(t * h * w, device=video.device)
            return index[index // (h * w) % self.frame_stride == 0].expand(len(video), -1), None
        if self.tube_masks:  # all clips keep as many
            t, s, _ = grid_of_tubes(keep, grid)
            return keep.unflatten(1, (t, s))[:, :: self.frame_stride].flatten(1), None
        ours = keep // (h * w) % self.frame_stride == 0
        first = ours.int().argsort(dim=1, descending=True, stable=True)[:, : int(ours.sum(1).max())]
        there = F.pad(ours.gather(1, first), (1, 0), value=True)
        return keep.gather(1, first), there[:, None, None]


SIZES = {
    "multiscale_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "fast_embed_dim": 96, "fast_num_heads": 3},
    "multiscale_small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "fast_embed_dim": 96, "fast_num_heads": 3},
    "multiscale_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "fast_embed_dim": 192, "fast_num_heads": 3},
}

# Each takes the keyword arguments of MultiscaleTransformer; what is given overrides the size.
multiscale_tiny = partial(MultiscaleTransformer, **SIZES["multiscale_tiny"])
multiscale_small = partial(MultiscaleTransformer, **SIZES["multiscale_small"])
multiscale_base = partial(MultiscaleTransformer, **SIZES["multiscale_base"])
