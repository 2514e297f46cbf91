"""Future-frame prediction with a divided space-time transformer and a query token for every future patch.

Based on the generative fork of TimeSformer-pytorch, with two corrections: all layers run (the fork leaves its loop
after the first layer), and predicted patches are rearranged to their positions in the frame (the fork only reshapes
them).
"""

import math
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from torch import nn

from tubelet.grid import Grid, as_pair
from tubelet.layers.checks import head_width
from tubelet.layers.coordinates import locate
from tubelet.layers.groups import Groups
from tubelet.layers.init import init_weights
from tubelet.layers.mixing import RegularAttention
from tubelet.layers.patch_embed import ClipEmbed
from tubelet.layers.positions import sincos_3d
from tubelet.layers.rope import RopeTables, axial_rope
from tubelet.models.fast_timesformer import SpaceTimeBlock
from tubelet.models.interfaces import Encoder


class TargetAttention(RegularAttention):
    """Attention of K clip tokens within their groups, and of the target tokens that follow them to all tokens.

    [B, K + targets, D] -> [B, K + targets, D]. `groups` partition the clip tokens. Clip tokens never attend to targets,
    so the features of a clip do not depend on whether frames are predicted.
    """

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups | None) -> torch.Tensor:
        if groups is None:
            raise ValueError("TargetAttention needs the groups of the clip tokens")
        K = groups.num_tokens()
        clip = super().attend(q[:, :K], k[:, :K], v[:, :K], groups)
        targets = self.mix(q[:, K:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)
        return torch.cat([clip, targets.transpose(1, 2).flatten(2)], dim=1)


class GenerativeTimeSformer(Encoder):
    """Predict the frames that follow a clip; an encoder if `num_target_frames` is 0.

    The clip tokens attend over time, then over space. One target token for every patch of the future frames attends to
    all tokens in both steps. It is initialized with a learned vector, the position embedding of the patch and the
    embedding of the last clip patch at the same location, which speeds up learning considerably. A linear layer maps it
    to pixels. Positions are fixed 3D sin-cos embeddings, so clips of any size that patches and tubelets divide work
    without interpolation.

    Clips have the shape [B, C, T, H, W] or [B, T, C, H, W], and the predicted frames the same layout. The dimension of
    size `in_chans` determines which; if both match, it is [B, C, T, H, W].

    Args:
        img_size: Frame size in pixels: the side of a square or (height, width).
        patch_size: Side of a patch in pixels.
        num_frames: Frames per clip.
        tubelet_size: Frames per token.
        in_chans: Channels of the video.
        out_chans: Channels of the predicted frames.
        num_target_frames: Number of future frames to predict; 0 builds an encoder.
        num_classes: Classes of a linear head on the mean token; 0 for no head. Excludes `num_target_frames`.
        embed_dim: Width D of the tokens.
        depth: Number of transformer blocks.
        num_heads: Attention heads per block; must divide `embed_dim` unless `head_dim` is given.
        head_dim: Channels per head; `embed_dim / num_heads` if None.
        mlp_ratio: Hidden width of the MLP divided by `embed_dim`.
        qkv_bias: Add a learnable bias to queries, keys and values.
        drop_rate: Dropout probability after attention projections and in MLPs.
        attn_drop_rate: Dropout probability of the attention weights.
        uniform_power: Give time, row and column a third of the channels of the sin-cos position embeddings each;
            by default they get 1/2, 1/4 and 1/4.
        use_rope: Rotate queries and keys by their positions in addition to the position embeddings.
        init_std: Standard deviation of the initial weights (truncated normal).

    Raises:
        ValueError: If sizes are incompatible.

    Example:
        >>> model = GenerativeTimeSformer(img_size=32, num_frames=8, num_target_frames=4, out_chans=1, embed_dim=96)
        >>> clips = torch.randn(2, 3, 8, 32, 32)
        >>> model(clips).shape, model.forward_features(clips).shape
        (torch.Size([2, 1, 4, 32, 32]), torch.Size([2, 32, 96]))
    """

    pos_embed: torch.Tensor

    accepts_masks = True

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        num_frames: int = 8,
        tubelet_size: int = 1,
        in_chans: int = 3,
        out_chans: int = 3,
        num_target_frames: int = 4,
        num_classes: int = 0,
        embed_dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        head_dim: int | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        uniform_power: bool = True,
        use_rope: bool = False,
        init_std: float = 0.02,
    ):
        super().__init__()
        if num_target_frames < 0 or num_target_frames % tubelet_size:
            raise ValueError(
                f"num_target_frames {num_target_frames} cannot be cut into tubelets of {tubelet_size}; "
                "use a multiple of the tubelet size"
            )
        if num_classes and num_target_frames:
            raise ValueError(
                f"num_classes {num_classes} and num_target_frames {num_target_frames}: this model predicts either "
                "classes or frames; set one of them to 0"
            )
        head_dim = head_width(embed_dim, num_heads) if head_dim is None else head_dim
        if use_rope and (head_dim % 2 or head_dim < 6):
            raise ValueError(
                f"use_rope: rotary positions need an even number of channels per head, at least 6, not {head_dim}; "
                "change num_heads"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.use_rope = use_rope
        self.tubelet_size = tubelet_size
        self.patch_size = patch_size
        self.uniform_power = uniform_power
        self.target_length = num_target_frames // tubelet_size
        self.patch_embed = ClipEmbed(patch_size, tubelet_size, in_chans, embed_dim)
        self.grid = self.grid_size(num_frames, *as_pair(img_size))
        # Determined by the configuration, so not part of the state dict.
        self.register_buffer("pos_embed", self._sincos(self.grid), persistent=False)

        attention = partial(TargetAttention, embed_dim, num_heads, qkv_bias, drop_rate, attn_drop_rate, head_dim)
        self.blocks = nn.ModuleList(
            SpaceTimeBlock(embed_dim, [attention(), attention()], mlp_ratio, drop_rate) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else None
        if num_target_frames:
            self.target_token = nn.Parameter(torch.empty(embed_dim))
            self.to_pixels = nn.Linear(embed_dim, out_chans * tubelet_size * patch_size**2)
            nn.init.trunc_normal_(self.target_token, std=init_std)
        init_weights(self, init_std)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Return the token grid (t, h, w) of a clip.

        Raises:
            ValueError: If the tubelet or patch size does not divide the clip size.
        """
        return self.patch_embed.grid_size(num_frames, height, width)

    def forward(
        self, video: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Predict frames or classes, or encode clips.

        Args:
            video: Clips [B, C, T, H, W] or [B, T, C, H, W].
            masks: Indices [B, K] of the tokens to keep, or a list of such masks; all tokens if None.

        Returns:
            Frames [B, out_chans, num_target_frames, H, W], or [B, num_target_frames, out_chans, H, W] if the clips are
            [B, T, C, H, W]. If `num_target_frames` is 0, logits [B, num_classes] or the tokens of `forward_features`. A
            list of these for a list of masks.
        """
        if isinstance(masks, list):
            return [self._predict(video, mask) for mask in masks]
        return self._predict(video, masks)

    def forward_features(
        self, video: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None
    ) -> torch.Tensor | list[torch.Tensor]:
        """Encode clips.

        Args:
            video: Clips [B, C, T, H, W] or [B, T, C, H, W].
            masks: Indices [B, K] of the tokens to keep, or a list of such masks; all tokens if None. Dropped tokens are
                never computed.

        Returns:
            Tokens [B, N, D], or [B, K, D] with a mask. A list of these for a list of masks.
        """
        if isinstance(masks, list):
            return [self._encode(video, mask) for mask in masks]
        return self._encode(video, masks)

    def unpatchify(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Rearrange patches [B, t*h*w, C*s*p*q] to frames [B, C, T, H, W], for tubelets of s x p x q pixels."""
        t, h, w = grid
        s, p = self.tubelet_size, self.patch_size
        return rearrange(patches, "B (t h w) (C s p q) -> B C (t s) (h p) (w q)", t=t, h=h, w=w, s=s, p=p, q=p)

    def _predict(self, video: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        if self.target_length:
            return self._predict_frames(video, keep)
        tokens = self._encode(video, keep)
        return tokens if self.head is None else self.head(tokens.mean(dim=1))

    def _encode(self, video: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        video = self.patch_embed.channels_first(video)
        grid = self.grid_size(*video.shape[2:])
        return self._run_blocks(self.patch_embed(video, keep) + self._clip_positions(grid, keep), grid, keep)

    def _predict_frames(self, video: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        frames_first = self.patch_embed.frames_first(video)
        video = self.patch_embed.channels_first(video)
        grid = t, h, w = self.grid_size(*video.shape[2:])
        patches = self.patch_embed(video, keep)
        last = repeat(self._last_patches(patches, grid, keep), "B n D -> B (t n) D", t=self.target_length)
        targets = self.target_token + self._positions(grid)[t * h * w :] + last
        clip = patches + self._clip_positions(grid, keep)
        x = self._run_blocks(torch.cat([clip, targets], dim=1), grid, keep)
        frames = self.unpatchify(self.to_pixels(x[:, clip.shape[1] :]), Grid(self.target_length, h, w))
        return frames.transpose(1, 2) if frames_first else frames

    @staticmethod
    def _last_patches(patches: torch.Tensor, grid: Grid, keep: torch.Tensor | None) -> torch.Tensor:
        """Return the patches of the last temporal index [B, h*w, D], with zeros for dropped ones."""
        t, h, w = grid
        if keep is not None:
            empty = patches.new_zeros(len(patches), t * h * w, patches.shape[-1])
            patches = empty.scatter(1, keep.unsqueeze(-1).expand_as(patches), patches)
        return patches[:, -h * w :]

    def _run_blocks(self, x: torch.Tensor, grid: Grid, keep: torch.Tensor | None) -> torch.Tensor:
        rope = self._rope(x, grid, keep) if self.use_rope else None
        layout = [(rope, Groups(grid, "time", keep)), (rope, Groups(grid, "space", keep))]
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x)

    def _rope(self, x: torch.Tensor, grid: Grid, keep: torch.Tensor | None) -> RopeTables:
        """Return the rotary tables of the clip tokens and of the target tokens that follow them in `x`, if any."""
        t, h, w = grid
        kept = torch.arange(t * h * w, device=x.device)[None] if keep is None else keep
        targets = torch.arange(t * h * w, t * h * w + x.shape[1] - kept.shape[1], device=x.device)
        index = torch.cat([kept, targets.expand(len(kept), -1)], dim=1)
        return axial_rope(self.head_dim, locate(index, grid))

    def _clip_positions(self, grid: Grid, keep: torch.Tensor | None) -> torch.Tensor:
        positions = self._positions(grid)
        return positions[: math.prod(grid)] if keep is None else positions[keep]

    def _positions(self, grid: Grid) -> torch.Tensor:
        """Return the position embeddings [clip tokens + target tokens, D] for clips of this grid."""
        return self.pos_embed if grid == self.grid else self._sincos(grid).to(self.pos_embed)

    def _sincos(self, grid: Grid) -> torch.Tensor:
        t, h, w = grid
        return sincos_3d(self.embed_dim, Grid(t + self.target_length, h, w), self.uniform_power)


class TimeSformer(GenerativeTimeSformer):
    """GenerativeTimeSformer with the argument names of the published model.

    Example:
        >>> model = TimeSformer(dim=64, image_size=32, num_frames=8, num_target_frames=4, out_channels=1, depth=2)
        >>> model(torch.randn(2, 8, 3, 32, 32)).shape
        torch.Size([2, 4, 1, 32, 32])
    """

    def __init__(
        self,
        *,
        dim: int,
        num_frames: int,
        num_target_frames: int = 4,
        image_size: int = 224,
        patch_size: int = 16,
        channels: int = 3,
        out_channels: int = 3,
        depth: int = 12,
        heads: int = 8,
        dim_head: int = 64,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
    ):
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            num_frames=num_frames,
            in_chans=channels,
            out_chans=out_channels,
            num_target_frames=num_target_frames,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            head_dim=dim_head,
            drop_rate=ff_dropout,
            attn_drop_rate=attn_dropout,
        )


SIZES: dict[str, dict[str, Any]] = {
    "generative_timesformer_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "generative_timesformer_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "generative_timesformer_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Encoders unless `num_target_frames` is set. Factories accept all keyword arguments of GenerativeTimeSformer, which
# override the preset.
_encoder = partial(GenerativeTimeSformer, num_target_frames=0)
generative_timesformer_tiny = partial(_encoder, **SIZES["generative_timesformer_tiny"])
generative_timesformer_small = partial(_encoder, **SIZES["generative_timesformer_small"])
generative_timesformer_base = partial(_encoder, **SIZES["generative_timesformer_base"])
