"""Space-time attention within local 3D windows that are shifted in every second block, as in Video Swin."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tubelet.grid import Grid
from tubelet.layers.attention import AttentionFn
from tubelet.layers.patterns import Pattern, Window
from tubelet.layers.rope import RopePairing
from tubelet.models.sparse import SparseTransformer


class WindowedTransformer(SparseTransformer):
    """Vision transformer with windowed attention ("Video Swin Transformer", Liu et al. 2022, section 3.2).

    Unlike Video Swin it has a single resolution and the positions of VisionTransformer. If the windows do not divide
    the grid, it is padded and the padding masked. Kept tokens attend within the same windows. Parameter names equal
    those of VisionTransformer.

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
        window_size: Window size in tokens: frames, rows, columns.
        shifted: Shift the window borders by half a window in every second block. Without it, windows never exchange
            information.
        num_classes: Classes of a linear head; 0 for no head, so that the encoder returns tokens.
        init_std: Standard deviation of the initial weights (truncated normal).
        uniform_power: Give time, row and column a third of the channels of the sin-cos position embeddings each;
            by default they get 1/2, 1/4 and 1/4.
        use_rope: Use rotary positions instead of sin-cos position embeddings.
        rope_pairing: Rotary frequencies: `interleaved` as in RoFormer, or `vjepa2` for released weights of V-JEPA 2.
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If sizes are incompatible or `window_size` is not three positive integers.

    Example:
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
        uniform_power: bool = True,
        use_rope: bool = False,
        rope_pairing: RopePairing = "interleaved",
        use_activation_checkpointing: bool = False,
    ):
        window = Window(window_size)
        t, h, w = window.size
        half = Window(window.size, (t // 2, h // 2, w // 2))
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

    def attention_fn(self, pattern: Pattern, keep: Tensor | None, grid: Grid, device: torch.device) -> AttentionFn:
        if isinstance(pattern, Window):
            pattern = pattern.fitted(grid)
        return super().attention_fn(pattern, keep, grid, device)


SIZES: dict[str, dict[str, Any]] = {
    "windowed_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "windowed_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "windowed_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Factories accept all keyword arguments of WindowedTransformer, which override the preset.
windowed_tiny = partial(WindowedTransformer, **SIZES["windowed_tiny"])
windowed_small = partial(WindowedTransformer, **SIZES["windowed_small"])
windowed_base = partial(WindowedTransformer, **SIZES["windowed_base"])
