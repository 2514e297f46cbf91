"""Joint space-time attention restricted by patterns: local in time, every s-th patch, strided in time, and so on."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tubelet.layers.attention_patterns import Attend, Pattern, PatternBlock, attention_under, parse_pattern
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.patch_embed import PatchEmbed3D
from tubelet.layers.positions import Grid, Positions, RopePairing


class VideoEncoder(nn.Module, ABC):
    """What encoders of clips share: the token grid, lists of masks, and with `num_classes` a head on the mean token.

    A subclass computes the tokens in `encode`. Raises ValueError for sizes that patches or tubelets do not fill.
    """

    accepts_masks = True

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        embed_dim: int,
        num_heads: int,
        num_classes: int,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = self.grid_size(num_frames, height, width)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else None

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along time, rows and columns of a clip; ValueError where patches or tubelets do not fill it."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"{height}x{width} pixels cannot be cut into patches of {self.patch_size}; "
                "crop to a multiple of the patch size"
            )
        if num_frames % self.tubelet_size:
            raise ValueError(
                f"{num_frames} frames cannot be cut into tubelets of {self.tubelet_size}; "
                "take a multiple of the tubelet size (an image can be repeated)"
            )
        return num_frames // self.tubelet_size, height // self.patch_size, width // self.patch_size

    def forward(self, video: Tensor, masks: Tensor | list[Tensor] | None = None) -> Tensor | list[Tensor]:
        """The tokens, as `forward_features`; with `num_classes` their logits [B, num_classes]."""
        tokens = self.forward_features(video, masks)
        if self.head is None:
            return tokens
        if isinstance(tokens, list):
            return [self.head(some.mean(1)) for some in tokens]
        return self.head(tokens.mean(1))

    def forward_features(self, video: Tensor, masks: Tensor | list[Tensor] | None = None) -> Tensor | list[Tensor]:
        """Clips [B, C, T, H, W] -> tokens [B, N, D]; [B, K, D] for `masks` [B, K], the tokens to keep; lists alike."""
        if isinstance(masks, list):
            return [self.forward_features(video, mask) for mask in masks]
        return self.encode(video, masks, self._grid_of(video))

    @abstractmethod
    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> Tensor:
        """Clips -> the normed tokens [B, N, D], or [B, K, D] for `keep` [B, K]."""

    def _grid_of(self, video: Tensor) -> Grid:
        if video.ndim != 5:
            raise ValueError(
                f"this encoder takes clips [B, C, T, H, W], not {list(video.shape)}; repeat an image over the frames"
            )
        return self.grid_size(*video.shape[2:])


class SparseTransformer(VideoEncoder):
    """A vision transformer whose blocks attend by `patterns`, one after the other, and again from the first.

    A pattern is a `Pattern` of tubelet.layers.attention_patterns or its text. By default even blocks see all patches of
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
        super().__init__(img_size, patch_size, num_frames, tubelet_size, embed_dim, num_heads, num_classes)
        if isinstance(patterns, str) or not patterns:
            raise ValueError(f"patterns {patterns!r}: give a list of at least one pattern")
        parsed = [parse_pattern(pattern) if isinstance(pattern, str) else pattern for pattern in patterns]
        self.patterns = list(islice(cycle(parsed), depth))
        self.use_activation_checkpointing = use_activation_checkpointing
        self.patch_embed = PatchEmbed3D(patch_size, tubelet_size, in_chans, embed_dim)
        self.positions = Positions(embed_dim, num_heads, self.grid, True, uniform_power, use_rope, rope_pairing)
        norm_layer = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.ModuleList(
            PatternBlock(embed_dim, num_heads, mlp_ratio, drop_rate, norm_layer=norm_layer) for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        init_weights(self, init_std)
        rescale_blocks(self.blocks)

    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> Tensor:
        x = self.positions.add(self.patch_embed(video, keep), keep, grid)
        rope = self.positions.rope(keep, grid)
        attends = {pattern: self.attend_by(pattern, grid, keep, x) for pattern in dict.fromkeys(self.patterns)}
        for block, pattern in zip(self.blocks, self.patterns, strict=True):
            if self.use_activation_checkpointing and self.training:
                x = checkpoint(block, x, rope, attends[pattern], use_reentrant=False)
            else:
                x = block(x, rope, attends[pattern])
        return self.norm(x)

    def attend_by(self, pattern: Pattern, grid: Grid, keep: Tensor | None, like: Tensor) -> Attend:
        """Attention by this pattern among all tokens of the grid, or among `keep` [B, K]."""
        return attention_under((pattern,), grid, keep, like, self.embed_dim // self.num_heads)


SIZES = {
    "sparse_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "sparse_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "sparse_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Each takes the keyword arguments of SparseTransformer; what is given overrides the size.
sparse_tiny = partial(SparseTransformer, **SIZES["sparse_tiny"])
sparse_small = partial(SparseTransformer, **SIZES["sparse_small"])
sparse_base = partial(SparseTransformer, **SIZES["sparse_base"])
