"""Joint space-time attention within local 3D windows, every second block with shifted ones, as in Video Swin."""

from functools import partial

from torch import Tensor

from tubelet.layers.attention import Attend
from tubelet.layers.patterns import Window
from tubelet.layers.positions import Grid, RopePairing
from tubelet.models.sparse import SparseTransformer


class WindowedTransformer(SparseTransformer):
    """A vision transformer whose tokens attend within windows of `window_size` (time slots, rows, columns).

    With `shifted`, every second block moves the windows' borders by half a window (Liu et al. 2022, "Video Swin
    Transformer", section 3.2); without, no window ever hears of another. Unlike Video Swin it keeps one resolution, and
    positions are VisionTransformer's. A grid that windows do not divide is padded, and the padding masked. Kept tokens
    attend under the same windows as a mask. The parameters are named as VisionTransformer's. Raises ValueError for
    sizes that do not fit.

    >>> encoder = WindowedTransformer(64, 8, 8, window_size=(2, 4, 4), embed_dim=192, num_heads=3)
    >>> encoder(torch.randn(2, 3, 8, 64, 64)).shape
    torch.Size([2, 256, 192])
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
        window_size: tuple[int, int, int] = (2, 7, 7),
        shifted: bool = True,
        num_classes: int = 0,
        init_std: float = 0.02,
        uniform_power: bool = False,
        use_rope: bool = False,
        rope_pairing: RopePairing = "interleaved",
        use_activation_checkpointing: bool = False,
    ):
        window = Window(tuple(window_size))
        half = Window(window.size, tuple(size // 2 for size in window.size))
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            num_frames=num_frames,
            tubelet_size=tubelet_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            patterns=(window, half) if shifted else (window,),
            num_classes=num_classes,
            init_std=init_std,
            uniform_power=uniform_power,
            use_rope=use_rope,
            rope_pairing=rope_pairing,
            use_activation_checkpointing=use_activation_checkpointing,
        )

    def attend_by(self, pattern: Window, keep: Tensor | None, grid: Grid, like: Tensor) -> Attend:
        return super().attend_by(pattern.fitted(grid), keep, grid, like)


SIZES = {
    "windowed_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "windowed_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "windowed_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Each takes the keyword arguments of WindowedTransformer; what is given overrides the size.
windowed_tiny = partial(WindowedTransformer, **SIZES["windowed_tiny"])
windowed_small = partial(WindowedTransformer, **SIZES["windowed_small"])
windowed_base = partial(WindowedTransformer, **SIZES["windowed_base"])
