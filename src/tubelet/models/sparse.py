"""Sparse space-time attention: patterns restrict which tokens attend to each other, e.g. local or strided ones."""

from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from tubelet.grid import Grid
from tubelet.layers import Block, PatchEmbed3D
from tubelet.layers.attention import AttentionFn
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.pattern_attention import pattern_attention
from tubelet.layers.patterns import Pattern, parse_pattern
from tubelet.layers.positions import Positions
from tubelet.layers.rope import RopePairing
from tubelet.models.video_encoder import VideoEncoder


class SparseTransformer(VideoEncoder):
    """Vision transformer whose blocks attend under sparse patterns.

    By default, even blocks attend to all tokens of the same and the two adjacent frames of tokens, odd blocks to every
    second row, column and frame and to the same location at all times. Alternating local and strided attention follows
    "Generating Long Sequences with Sparse Transformers" (Child et al. 2019, section 4.2), here in space and time.
    Parameter names equal those of VisionTransformer.

    Args:
        img_size: Frame size in pixels: the side of a square or (height, width).
        patch_size: Side of a patch in pixels.
        num_frames: Frames per clip.
        tubelet_size: Frames per token.
        in_chans: Channels of the video.
        embed_dim: Width D of the tokens.
        depth: Number of transformer blocks.
        num_heads: Attention heads per block; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLP divided by `embed_dim`.
        drop_rate: Dropout probability after attention projections and in MLPs.
        patterns: Attention patterns of the blocks, cycled if there are more blocks: `Pattern` objects or expressions
            such as "TemporalWindow(1) & SpatialStride(2)", see tubelet.layers.patterns.
        num_classes: Classes of a linear head; 0 for no head, so that the encoder returns tokens.
        init_std: Standard deviation of the initial weights (truncated normal).
        uniform_power: Give time, row and column a third of the channels of the sin-cos position embeddings each;
            by default they get 1/2, 1/4 and 1/4.
        use_rope: Use rotary positions instead of sin-cos position embeddings.
        rope_pairing: Rotary frequencies: `interleaved` as in RoFormer, or `vjepa2` for released weights of V-JEPA 2.
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If sizes are incompatible or a pattern cannot be parsed.

    Example:
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
        uniform_power: bool = True,
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
            raise ValueError(f"patterns {patterns!r}: expected a list of at least one pattern")
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
        attend = {pattern: self.attention_fn(pattern, keep, grid, x.device) for pattern in dict.fromkeys(self.patterns)}
        for block, pattern in zip(self.blocks, self.patterns, strict=True):
            x = self.run(block, x, rope, attend[pattern])
        x = self.norm(x)
        return x, x.mean(1)

    def attention_fn(self, pattern: Pattern, keep: Tensor | None, grid: Grid, device: torch.device) -> AttentionFn:
        """Return the attention function of a pattern for all tokens of the grid or for `keep` [B, K]."""
        return pattern_attention((pattern,), grid, keep, device, self.head_dim, tubes=self.tube_masks)


SIZES: dict[str, dict[str, Any]] = {
    "sparse_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "sparse_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "sparse_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Factories accept all keyword arguments of SparseTransformer, which override the preset.
sparse_tiny = partial(SparseTransformer, **SIZES["sparse_tiny"])
sparse_small = partial(SparseTransformer, **SIZES["sparse_small"])
sparse_base = partial(SparseTransformer, **SIZES["sparse_base"])
