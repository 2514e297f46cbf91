"""Joint space-time attention restricted by patterns: local in time, every s-th patch, strided in time, and so on."""

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice

from torch import Tensor, nn

from tubelet.layers import Block, PatchEmbed3D
from tubelet.layers.attention import Attend
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.pattern_attention import attention_under
from tubelet.layers.patterns import Pattern, parse_pattern
from tubelet.layers.positions import Grid, Positions, RopePairing
from tubelet.models.video_encoder import VideoEncoder


class SparseTransformer(VideoEncoder):
    """A vision transformer whose blocks attend by `patterns`, one after the other, and again from the first.

    A pattern is a `Pattern` of tubelet.layers.patterns or its text. By default even blocks see all patches of
    their own and the two neighbouring time slots; odd ones every second patch of every second slot, and their own place
    at all times: local and strided attention by turns, as in "Generating Long Sequences with Sparse Transformers"
    (Child et al. 2019, section 4.2), here in space and time. The parameters are named as VisionTransformer's. Raises
    ValueError for patterns and sizes that do not exist.

    >>> encoder = SparseTransformer(64, 16, 8, embed_dim=192, num_heads=3, patterns=["TemporalWindow(1)"])
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
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        patterns: Sequence[str | Pattern] = (
            "TemporalWindow(1)",
            "TemporalStride(2) & SpatialStride(2) | SpatialWindow(0)",
        ),
        num_classes: int = 0,
        init_std: float = 0.02,
        uniform_power: bool = False,
        use_rope: bool = False,
        rope_pairing: RopePairing = "interleaved",
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
        if isinstance(patterns, str) or not patterns:
            raise ValueError(f"patterns {patterns!r}: give a list of at least one pattern")
        parsed = [parse_pattern(pattern) if isinstance(pattern, str) else pattern for pattern in patterns]
        self.patterns = list(islice(cycle(parsed), depth))
        self.patch_embed = PatchEmbed3D(patch_size, tubelet_size, in_chans, embed_dim)
        self.positions = Positions(embed_dim, num_heads, self.grid, True, uniform_power, use_rope, rope_pairing)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, drop=drop_rate, norm_layer=norm_layer)
            for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        init_weights(self, init_std)
        rescale_blocks(self.blocks)

    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        x = self.positions.add(self.patch_embed(video, keep), keep, grid)
        rope = self.positions.rope(keep, grid)
        attends = {pattern: self.attend_by(pattern, keep, grid, x) for pattern in dict.fromkeys(self.patterns)}
        for block, pattern in zip(self.blocks, self.patterns, strict=True):
            x = self.run(block, x, rope, attends[pattern])
        x = self.norm(x)
        return x, x.mean(1)

    def attend_by(self, pattern: Pattern, keep: Tensor | None, grid: Grid, like: Tensor) -> Attend:
        """Attention by this pattern among all tokens of the grid, or among `keep` [B, K], on the device of `like`."""
        return attention_under((pattern,), grid, keep, like, self.head_dim, tubes=self.tube_masks)


SIZES = {
    "sparse_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "sparse_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "sparse_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Each takes the keyword arguments of SparseTransformer; what is given overrides the size.
sparse_tiny = partial(SparseTransformer, **SIZES["sparse_tiny"])
sparse_small = partial(SparseTransformer, **SIZES["sparse_small"])
sparse_base = partial(SparseTransformer, **SIZES["sparse_base"])
