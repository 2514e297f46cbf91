"""Vision transformer of V-JEPA (fixed sin-cos positions), V-JEPA 2 and 2.1 (rotary ones), for videos and images."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt
from torch import nn

from tubelet.grid import ClipShape, Grid, as_pair
from tubelet.layers import Block, PatchEmbed, PatchEmbed3D
from tubelet.layers.attention import AttentionFn
from tubelet.layers.block import run_block
from tubelet.layers.init import init_weights, rescale_blocks
from tubelet.layers.pattern_attention import pattern_attention
from tubelet.layers.patterns import Lookback
from tubelet.layers.positions import Positions
from tubelet.layers.rope import RopePairing
from tubelet.layers.segments import attend_in_segments, join
from tubelet.models.interfaces import Encoder


class VisionTransformer(Encoder):
    """Vision transformer with joint space-time attention (Bardes et al. 2024; Assran et al. 2025).

    Args:
        img_size: Frame size in pixels: the side of a square or (height, width).
        patch_size: Side of a patch in pixels.
        num_frames: Frames per clip; 1 builds an image encoder.
        tubelet_size: Frames per token.
        in_chans: Channels of the video.
        embed_dim: Width D of the tokens.
        depth: Number of transformer blocks.
        num_heads: Attention heads per block; must divide `embed_dim`.
        mlp_ratio: Hidden width of the MLP divided by `embed_dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        qk_scale: Factor of the attention logits; 1 / sqrt(head width) if None.
        drop_rate: Dropout probability after attention projections and in MLPs.
        attn_drop_rate: Dropout probability of the attention weights.
        norm_layer: Factory of the normalization layers, called with `embed_dim`.
        init_std: Standard deviation of the initial weights (truncated normal).
        out_layers: Return the normalized features after these blocks (from 0) instead of the last features.
        uniform_power: Give time, row and column a third of the channels of the sin-cos position embeddings each;
            by default they get 1/2, 1/4 and 1/4.
        use_rope: Use rotary positions instead of sin-cos position embeddings.
        rope_pairing: Rotary frequencies: `interleaved` as in RoFormer, or `vjepa2` for released weights of V-JEPA 2.
        rope_extent: Spread the rotary positions of rows and columns evenly over 0 to rope_extent - 1, whatever the size
            of the frames (V-JEPA 2.1: 16); None: the numbers of rows and columns.
        use_silu: Use SwiGLU feed-forward layers instead of MLPs.
        wide_silu: Reduce the hidden width of SwiGLU to 2/3, so that it has as many parameters as the MLP.
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.
        depth_scaled_init: Divide the output projections of block l by sqrt(2 l), as in BEiT; False leaves them as
            drawn, as V-JEPA's trainer does.
        block_causal: Let a token attend to the tokens of its own and of earlier time slots only, so that features do
            not depend on later frames; by default it attends to all tokens.
        levels: Blocks whose tokens have a normalization layer of their own, for `all_levels` of `forward` (V-JEPA 2.1):
            the number of evenly spaced blocks, or these blocks (from 0). The last one is always among them.
        image_tokenizer: Embed single frames with an own patch embedding, one frame deep (V-JEPA 2.1). Training on clips
            alone does not use it.
        subtract_mean_frame: Subtract from each frame the mean of the frames of its clip, which removes what does not
            move: for videos from a fixed camera.

    Raises:
        ValueError: If sizes, heads or layers are incompatible.

    Example:
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
        embed_dim: PositiveInt = 768,
        depth: PositiveInt = 12,
        num_heads: PositiveInt = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        init_std: PositiveFloat = 0.02,
        out_layers: Sequence[int] | None = None,
        uniform_power: bool = True,
        use_rope: bool = False,
        rope_pairing: RopePairing = "interleaved",
        use_silu: bool = False,
        wide_silu: bool = True,
        use_activation_checkpointing: bool = False,
        depth_scaled_init: bool = True,
        block_causal: bool = False,
        levels: int | Sequence[int] = 1,
        image_tokenizer: bool = False,
        rope_extent: PositiveInt | None = None,
        subtract_mean_frame: bool = False,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.is_video = num_frames > 1
        self.image_tokenizer = image_tokenizer
        self.levels = level_blocks(levels, depth)
        self.out_layers = out_layers
        self.block_causal = block_causal
        self.subtract_mean_frame = subtract_mean_frame
        self.use_activation_checkpointing = use_activation_checkpointing
        if out_layers is not None and not all(0 <= layer < depth for layer in out_layers):
            raise ValueError(f"out_layers {list(out_layers)}: with depth {depth} the layers are 0 to {depth - 1}")

        if image_tokenizer and not self.is_video:
            raise ValueError("image_tokenizer: an encoder of images has one anyway; remove it, or set num_frames")
        if subtract_mean_frame and (image_tokenizer or not self.is_video):
            raise ValueError("subtract_mean_frame: nothing is left of a single frame; remove it for images")
        if subtract_mean_frame and block_causal:
            raise ValueError("subtract_mean_frame: the mean depends on later frames; remove it, or block_causal")

        self.grid = self.grid_size(num_frames, *as_pair(img_size))
        self.num_patches = self.grid.num_tokens
        self.patch_embed: PatchEmbed3D | PatchEmbed
        if self.is_video:
            self.patch_embed = PatchEmbed3D(patch_size, tubelet_size, in_chans, embed_dim)
        else:
            self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        if image_tokenizer:
            self.patch_embed_img = PatchEmbed3D(patch_size, 1, in_chans, embed_dim)
        self.positions = Positions(
            embed_dim, num_heads, self.grid, self.is_video, uniform_power, use_rope, rope_pairing, rope_extent
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
        self.level_norms = nn.ModuleList(norm_layer(embed_dim) for _ in self.levels[:-1])
        self.norm = norm_layer(embed_dim)
        init_weights(self, init_std)
        if depth_scaled_init:
            rescale_blocks(self.blocks)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Return the token grid (t, h, w) of a clip; t is 1 for images.

        Raises:
            ValueError: If the tubelet or patch size does not divide the clip size.
        """
        if not self.is_video or (self.image_tokenizer and num_frames == 1):
            return ClipShape(1, (height, width), self.patch_size, self.tubelet_size).grid
        return ClipShape(num_frames, (height, width), self.patch_size, self.tubelet_size).video_grid

    def forward(
        self, x: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None, all_levels: bool = False
    ):
        """Encode clips or images.

        Args:
            x: Clips [B, C, T, H, W], or images [B, C, H, W] if `num_frames` is 1 or there is an image tokenizer.
            masks: Indices [B, K] of the tokens to keep, or a list of such masks; all tokens if None. Dropped tokens are
                never computed. The tokens of all masks of a list form one sequence, see `tubelet.layers.segments`.
            all_levels: Return the tokens after each block of `levels`, normalized and concatenated.

        Returns:
            Tokens [B, N, D], or [B, K, D] with a mask; the width is len(levels) * D with `all_levels`. A list of these
            for a list of masks. With `out_layers` every entry is a list with the tokens of each layer.
        """
        keeps: list[Any] = masks if isinstance(masks, list) else [masks]
        keep = None if masks is None else join(keeps)
        if self.image_tokenizer and x.ndim == 4:
            x = x.unsqueeze(2)
        grid = self._grid_of(x)
        if not self.is_video and x.ndim == 5:
            x = x.squeeze(2)
        is_image = self.image_tokenizer and x.shape[2] == 1
        if self.subtract_mean_frame:
            x = x - x.mean(2, keepdim=True)
        embed = self.patch_embed_img if is_image else self.patch_embed
        x = self.positions.add(embed(x, keep), keep, grid)
        rope = self.positions.rope(keep, grid)
        lengths = [x.shape[1]] if keep is None else [mask.shape[1] for mask in keeps]
        attend = attend_in_segments(lengths, [self._attention(mask, grid, x.device) for mask in keeps], x)

        wanted = self.levels if all_levels else self.out_layers or ()
        features = []
        for layer, block in enumerate(self.blocks):
            x = run_block(block, x, rope, attend, use_checkpoint=self.use_activation_checkpointing and self.training)
            if layer in wanted:
                features.append(self._norm_of(layer)(x))
        if all_levels or self.out_layers is None:
            tokens = torch.cat(features, dim=-1) if all_levels else self.norm(x)
            return list(tokens.split(lengths, dim=1)) if isinstance(masks, list) else tokens
        if isinstance(masks, list):
            return [list(layers) for layers in zip(*(tokens.split(lengths, dim=1) for tokens in features), strict=True)]
        return features

    def freeze_unused(self) -> None:
        """Exclude from training what the last tokens of clips do not use: other levels' norms, image tokenizer."""
        self.level_norms.requires_grad_(False)
        if self.image_tokenizer:
            self.patch_embed_img.requires_grad_(False)

    def _norm_of(self, layer: int) -> nn.Module:
        """Return the normalization after a block: its own if it is a level, otherwise that of the last block."""
        return self.level_norms[self.levels.index(layer)] if layer in self.levels[:-1] else self.norm

    def _attention(self, keep: torch.Tensor | None, grid: Grid, device: torch.device) -> AttentionFn:
        if not self.block_causal:
            return F.scaled_dot_product_attention
        return pattern_attention((Lookback(),), grid, keep, device, self.embed_dim // self.num_heads)

    def _grid_of(self, x: torch.Tensor) -> Grid:
        channels = self.patch_embed.proj.in_channels
        if x.ndim in (4, 5) and x.shape[1] != channels:
            shape = f"[B, {channels}, T, H, W]" if x.ndim == 5 else f"[B, {channels}, H, W]"
            raise ValueError(f"expected {shape}, not {list(x.shape)}; the channels come before the frames")
        if self.is_video and x.ndim != 5:
            raise ValueError(
                f"this encoder takes clips [B, C, T, H, W], not {list(x.shape)}; repeat an image over the frames"
            )
        if not self.is_video and not (x.ndim == 4 or (x.ndim == 5 and x.shape[2] == 1)):
            raise ValueError(f"this encoder takes images [B, C, H, W], not {list(x.shape)}; set num_frames for clips")
        return self.grid_size(x.shape[2] if x.ndim == 5 else 1, *x.shape[-2:])


def level_blocks(levels: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Return the blocks of `levels`, a number of evenly spaced ones or the blocks themselves.

    Raises:
        ValueError: If there are no such blocks, or the last block is not the last of them.

    Example:
        >>> level_blocks(4, depth=24)
        (5, 11, 17, 23)
    """
    if isinstance(levels, int):
        if not 1 <= levels <= depth:
            raise ValueError(f"levels {levels}: expected 1 to {depth}, the depth")
        return tuple((level + 1) * depth // levels - 1 for level in range(levels))
    blocks = tuple(levels)
    if not blocks or list(blocks) != sorted(set(blocks)) or blocks[0] < 0 or blocks[-1] != depth - 1:
        raise ValueError(
            f"levels {list(blocks)}: expected ascending blocks from 0, and {depth - 1}, the last, at the end"
        )
    return blocks


SIZES: dict[str, dict[str, Any]] = {
    "vit_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0},
    "vit_small": {"embed_dim": 384, "depth": 12, "num_heads": 6, "mlp_ratio": 4.0},
    "vit_base": {"embed_dim": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0},
    "vit_large": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "mlp_ratio": 4.0},
    "vit_huge": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "mlp_ratio": 4.0},
    "vit_giant": {"embed_dim": 1408, "depth": 40, "num_heads": 16, "mlp_ratio": 48 / 11},
    # ViT-g of V-JEPA 2: the same widths, but heads of 64 channels.
    "vit_giant_xformers": {"embed_dim": 1408, "depth": 40, "num_heads": 22, "mlp_ratio": 48 / 11},
    # ViT-G of V-JEPA 2.1
    "vit_gigantic_xformers": {"embed_dim": 1664, "depth": 48, "num_heads": 26, "mlp_ratio": 64 / 13},
    "vit_gigantic": {"embed_dim": 1664, "depth": 48, "num_heads": 16, "mlp_ratio": 64 / 13, "patch_size": 14},
}

_vit = partial(VisionTransformer, norm_layer=partial(nn.LayerNorm, eps=1e-6))

# Factories accept all keyword arguments of VisionTransformer, which override the preset.
vit_tiny = partial(_vit, **SIZES["vit_tiny"])
vit_small = partial(_vit, **SIZES["vit_small"])
vit_base = partial(_vit, **SIZES["vit_base"])
vit_large = partial(_vit, **SIZES["vit_large"])
vit_huge = partial(_vit, **SIZES["vit_huge"])
vit_giant = partial(_vit, **SIZES["vit_giant"])
vit_giant_xformers = partial(_vit, **SIZES["vit_giant_xformers"])
vit_gigantic_xformers = partial(_vit, **SIZES["vit_gigantic_xformers"])
vit_gigantic = partial(_vit, **SIZES["vit_gigantic"])
