"""Future-frame prediction by a divided space-time transformer with tokens for the patches of the frames to come.

After the generative fork of TimeSformer-pytorch, with two corrections: all layers run (there, a `break` ends the loop
after the first), and predicted patches return to their places in the frame (there, they are reshaped as they lie).
"""

import math
from functools import partial

import torch
from einops import rearrange, repeat
from torch import nn

from tubelet.layers.checks import head_width
from tubelet.layers.groups import Groups
from tubelet.layers.init import init_weights
from tubelet.layers.mixing import RegularAttention
from tubelet.layers.patch_embed import ClipEmbed
from tubelet.layers.positions import Grid, RopeTables, axial_rope, locate, sincos_3d
from tubelet.models.fast_timesformer import SpaceTimeBlock


class TargetAttention(RegularAttention):
    """Attention of a clip's tokens within their groups, and of the target tokens that follow them over all tokens.

    [B, K + number of targets, D] -> the same, where `groups` hold the K tokens of the clip. These never look at the
    targets, so that a clip has the same features whether or not its future is asked for.
    """

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups) -> torch.Tensor:
        K = groups.num_tokens()
        clip = super().attend(q[:, :K], k[:, :K], v[:, :K], groups)
        targets = self.mix(q[:, K:].transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)
        return torch.cat([clip, targets.transpose(1, 2).flatten(2)], dim=1)


class GenerativeTimeSformer(nn.Module):
    """Clip -> the `num_target_frames` frames that follow it; with 0 of them an encoder like any other.

    Tokens of the clip attend over time, then over space. One token for each patch of the frames to come attends to all
    tokens in both steps. It starts as a learned vector at the patch's position plus what the clip showed last at that
    place, which makes learning much faster; a linear layer makes it pixels. Positions are fixed 3D sin-cos embeddings,
    hence any length and size that the patches divide. `use_rope` also turns queries and keys by their places, so that
    attention knows how far apart tokens are, while the embeddings still say where the edges are.

    `head_dim` is `embed_dim / num_heads` if None. `num_classes` > 0 puts a head on the mean token of the clip instead.
    Clips come as [B, C, T, H, W] or [B, T, C, H, W], and frames are returned likewise. The axis that has `in_chans`
    entries holds the channels; where both have, channels first. Raises ValueError for sizes that do not fit.

    >>> model = GenerativeTimeSformer(img_size=32, num_frames=8, num_target_frames=4, out_chans=1, embed_dim=96)
    >>> clips = torch.randn(2, 3, 8, 32, 32)
    >>> model(clips).shape, model.forward_features(clips).shape
    (torch.Size([2, 1, 4, 32, 32]), torch.Size([2, 32, 96]))
    """

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
        uniform_power: bool = False,
        use_rope: bool = False,
        init_std: float = 0.02,
    ):
        super().__init__()
        if num_target_frames < 0 or num_target_frames % tubelet_size:
            raise ValueError(
                f"num_target_frames {num_target_frames} cannot be cut into tubelets of {tubelet_size}; "
                "take a multiple of the tubelet size"
            )
        if num_classes and num_target_frames:
            raise ValueError(
                f"num_classes {num_classes} and num_target_frames {num_target_frames}: this model predicts classes or "
                "frames; set one of them to 0"
            )
        head_dim = head_width(embed_dim, num_heads) if head_dim is None else head_dim
        if use_rope and (head_dim % 2 or head_dim < 6):
            raise ValueError(
                f"use_rope: rotary positions need an even number of channels a head, at least 6, not {head_dim}; "
                "change num_heads"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.use_rope = use_rope
        self.tubelet_size = tubelet_size
        self.patch_size = patch_size
        self.uniform_power = uniform_power
        self.target_slots = num_target_frames // tubelet_size
        self.patch_embed = ClipEmbed(patch_size, tubelet_size, in_chans, embed_dim)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = self.grid_size(num_frames, height, width)
        # Fixed by the configuration, so not part of the state dict.
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
        """Tokens along time, rows and columns of a clip; ValueError where patches or tubelets do not fill it."""
        return self.patch_embed.grid_size(num_frames, height, width)

    def forward(self, video: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None):
        """Clips -> frames [B, out_chans, num_target_frames, H, W], or frames first where the clips are.

        Without target frames, logits [B, num_classes], or without classes the tokens of `forward_features`. With
        `masks`, all this from the kept tokens alone; a list of masks gives a list.
        """
        if isinstance(masks, list):
            return [self.forward(video, mask) for mask in masks]
        if self.target_slots:
            return self._frames(video, masks)
        tokens = self.forward_features(video, masks)
        return tokens if self.head is None else self.head(tokens.mean(dim=1))

    def forward_features(self, video: torch.Tensor, masks: torch.Tensor | list[torch.Tensor] | None = None):
        """Clips -> tokens [B, N, D]; with `masks` [B, K] the kept ones [B, K, D], with a list of masks a list.

        Tokens that are not kept take no part: no other token depends on them.
        """
        if isinstance(masks, list):
            return [self.forward_features(video, mask) for mask in masks]
        video = self.patch_embed.channels_first(video)
        grid = self.grid_size(*video.shape[2:])
        return self._blocks(self._clip_tokens(video, grid, masks), grid, masks)

    def unpatchify(self, patches: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Pixels of tokens [B, t*h*w, C*s*p*q] -> [B, C, T, H, W], for tubelets of s frames of p x q pixels."""
        t, h, w = grid
        s, p = self.tubelet_size, self.patch_size
        return rearrange(patches, "B (t h w) (C s p q) -> B C (t s) (h p) (w q)", t=t, h=h, w=w, s=s, p=p, q=p)

    def _frames(self, video: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        frames_first = self.patch_embed.frames_first(video)
        video = self.patch_embed.channels_first(video)
        grid = t, h, w = self.grid_size(*video.shape[2:])
        patches = self.patch_embed(video, keep)
        last = repeat(self._last(patches, grid, keep), "B places D -> B (slots places) D", slots=self.target_slots)
        targets = self.target_token + self._positions(grid)[t * h * w :] + last
        clip = patches + self._clip_positions(grid, keep)
        x = self._blocks(torch.cat([clip, targets], dim=1), grid, keep)
        frames = self.unpatchify(self.to_pixels(x[:, clip.shape[1] :]), (self.target_slots, h, w))
        return frames.transpose(1, 2) if frames_first else frames

    @staticmethod
    def _last(patches: torch.Tensor, grid: Grid, keep: torch.Tensor | None) -> torch.Tensor:
        """Patches of the last time slot [B, h*w, D]; zeros for those that are not kept."""
        t, h, w = grid
        if keep is not None:
            empty = patches.new_zeros(len(patches), t * h * w, patches.shape[-1])
            patches = empty.scatter(1, keep.unsqueeze(-1).expand_as(patches), patches)
        return patches[:, -h * w :]

    def _clip_tokens(self, video: torch.Tensor, grid: Grid, keep: torch.Tensor | None) -> torch.Tensor:
        return self.patch_embed(video, keep) + self._clip_positions(grid, keep)

    def _blocks(self, x: torch.Tensor, grid: Grid, keep: torch.Tensor | None) -> torch.Tensor:
        rope = self._rope(x, grid, keep) if self.use_rope else None
        layout = [(rope, Groups(grid, "time", keep)), (rope, Groups(grid, "space", keep))]
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x)

    def _rope(self, x: torch.Tensor, grid: Grid, keep: torch.Tensor | None) -> RopeTables:
        """Rotary tables of the tokens x: those of the clip, and behind them the targets where there are any."""
        t, h, w = grid
        kept = torch.arange(t * h * w, device=x.device)[None] if keep is None else keep
        targets = torch.arange(t * h * w, t * h * w + x.shape[1] - kept.shape[1], device=x.device)
        index = torch.cat([kept, targets.expand(len(kept), -1)], dim=1)
        return axial_rope(self.head_dim, locate(index, grid))

    def _clip_positions(self, grid: Grid, keep: torch.Tensor | None) -> torch.Tensor:
        positions = self._positions(grid)
        return positions[: math.prod(grid)] if keep is None else positions[keep]

    def _positions(self, grid: Grid) -> torch.Tensor:
        """[number of the clip's tokens and of the target tokens, D] for a clip of this grid."""
        return self.pos_embed if grid == self.grid else self._sincos(grid).to(self.pos_embed)

    def _sincos(self, grid: Grid) -> torch.Tensor:
        t, h, w = grid
        return sincos_3d(self.embed_dim, (t + self.target_slots, h, w), self.uniform_power)


class TimeSformer(GenerativeTimeSformer):
    """GenerativeTimeSformer with the arguments of the published model.

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


SIZES = {
    "generative_timesformer_tiny": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "generative_timesformer_small": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "generative_timesformer_base": {"embed_dim": 768, "depth": 12, "num_heads": 12},
}

# Encoders, until `num_target_frames` asks for frames. Keyword arguments of GenerativeTimeSformer override the size.
_encoder = partial(GenerativeTimeSformer, num_target_frames=0)
generative_timesformer_tiny = partial(_encoder, **SIZES["generative_timesformer_tiny"])
generative_timesformer_small = partial(_encoder, **SIZES["generative_timesformer_small"])
generative_timesformer_base = partial(_encoder, **SIZES["generative_timesformer_base"])
