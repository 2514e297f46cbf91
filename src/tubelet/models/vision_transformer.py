"""Vision transformer for videos and images, as in V-JEPA (fixed sin-cos positions) and V-JEPA 2 (rotary positions)."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from tubelet.layers import Block, PatchEmbed, PatchEmbed3D
from tubelet.layers.block import run_block
from tubelet.layers.checks import token_grid
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.positions import Grid, Positions, RopePairing


class VisionTransformer(nn.Module):
    """Tokens of a clip through `depth` blocks.

    `img_size` is the side or (height, width) in pixels, `num_frames` 1 means images. `out_layers` returns the normed
    features after these blocks instead of the last ones. `uniform_power` gives time, rows and columns equally many
    channels in the sin-cos positions. `use_rope` takes rotary positions instead, `rope_pairing="vjepa2"` those that the
    released weights of V-JEPA 2 need. `use_silu` takes SwiGLU layers. Raises ValueError for sizes that do not fit.

    >>> encoder = VisionTransformer(img_size=64, num_frames=8, embed_dim=192, num_heads=3)
    >>> clips = torch.randn(2, 3, 8, 64, 64)
    >>> encoder(clips).shape, encoder(clips, torch.tensor([[0, 5, 9], [1, 2, 3]])).shape
    (torch.Size([2, 64, 192]), torch.Size([2, 3, 192]))
    """

    accepts_masks = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 1,
        tubelet_size: int = 2,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: float = 0.02,
        out_layers: Sequence[int] | None = None,
        uniform_power: bool = False,
        use_rope: bool = False,
        rope_pairing: RopePairing = "interleaved",
        use_silu: bool = False,
        wide_silu: bool = True,
        use_activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.is_video = num_frames > 1
        self.out_layers = out_layers
        self.use_activation_checkpointing = use_activation_checkpointing
        if out_layers is not None and not all(0 <= layer < depth for layer in out_layers):
            raise ValueError(f"out_layers {list(out_layers)}: with depth {depth} the layers are 0 to {depth - 1}")

        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = self.grid_size(num_frames, height, width)
        self.num_patches = self.grid[0] * self.grid[1] * self.grid[2]
        if self.is_video:
            self.patch_embed = PatchEmbed3D(patch_size, tubelet_size, in_chans, embed_dim)
        else:
            self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.positions = Positions(
            embed_dim, num_heads, self.grid, self.is_video, uniform_power, use_rope, rope_pairing
        )
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                qk_scale,
                drop_rate,
                attn_drop_rate,
                norm_layer=norm_layer,
                use_silu=use_silu,
                wide_silu=wide_silu,
            )
            for _ in range(depth)
        )
        self.norm = norm_layer(embed_dim)
        init_weights(self, init_std)
        rescale_blocks(self.blocks)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along time, rows and columns of a clip; ValueError where patches or tubelets do not fill it."""
        num_frames = num_frames if self.is_video else self.tubelet_size  # an image is one time slot
        return token_grid(num_frames, height, width, self.tubelet_size, self.patch_size)

    def forward(self, x: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None):
        """Clips [B, C, T, H, W], or images [B, C, H, W] -> features [B, N, D].

        With `masks` [B, K], the indices of the tokens to keep, [B, K, D]: the others are never computed. With a list of
        masks, a list of features. With `out_layers` each of these is a list with one entry a layer.
        """
        if isinstance(masks, list):
            return [self.forward(x, mask) for mask in masks]
        grid = self._grid_of(x)
        if not self.is_video and x.ndim == 5:
            x = x.squeeze(2)
        x = self.positions.add(self.patch_embed(x, masks), masks, grid)
        rope = self.positions.rope(masks, grid)

        features = []
        for layer, block in enumerate(self.blocks):
            x = run_block(block, x, rope, save_memory=self.use_activation_checkpointing and self.training)
            if self.out_layers is not None and layer in self.out_layers:
                features.append(self.norm(x))
        return self.norm(x) if self.out_layers is None else features

    def _grid_of(self, x: torch.Tensor) -> Grid:
        if self.is_video and x.ndim != 5:
            raise ValueError(
                f"this encoder takes clips [B, C, T, H, W], not {list(x.shape)}; repeat an image over the frames"
            )
        if not self.is_video and not (x.ndim == 4 or (x.ndim == 5 and x.shape[2] == 1)):
            raise ValueError(f"this encoder takes images [B, C, H, W], not {list(x.shape)}; set num_frames for clips")
        return self.grid_size(x.shape[2] if x.ndim == 5 else 1, *x.shape[-2:])


SIZES = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0},
    "vit_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4.0},
    "vit_giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    # V-JEPA 2's giant: the same widths, heads of 64 channels.
    "vit_giant_xformers": {"embed_dim": 1408, "depth": 40, "num_heads": 22, "mlp_ratio": 48 / 11},
    "vit_gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13, "patch_size": 14},
}

_vit = partial(VisionTransformer, norm_layer=partial(nn.LayerNorm, eps=1e-6))

# Each takes the keyword arguments of VisionTransformer; what is given overrides the size.
vit_tiny = partial(_vit, **SIZES["vit_tiny"])
vit_small = partial(_vit, **SIZES["vit_small"])
vit_base = partial(_vit, **SIZES["vit_base"])
vit_large = partial(_vit, **SIZES["vit_large"])
vit_huge = partial(_vit, **SIZES["vit_huge"])
vit_giant = partial(_vit, **SIZES["vit_giant"])
vit_giant_xformers = partial(_vit, **SIZES["vit_giant_xformers"])
vit_gigantic = partial(_vit, **SIZES["vit_gigantic"])
