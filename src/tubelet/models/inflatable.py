"""Video encoders that can start as an image ViT of timm ("inflation")."""

from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from tubelet.layers.groups import FoldedTokens, ScatteredTokens, grid_of_tubes
from tubelet.layers.patch_embed import PatchEmbed3D
from tubelet.layers.positions import Grid, interpolated
from tubelet.models.video_encoder import VideoEncoder

TubeletInit = Literal["central_frame", "filter_inflation"]


class InflatableEncoder(VideoEncoder):
    """A VideoEncoder made as an image ViT of timm, plus what it does over time.

    A subclass has `blocks`, `norm`, `cls_token` (or None) and `positions`, and besides them only what
    `zero_init_temporal` can put out of action.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        in_chans: int,
        embed_dim: int,
        num_heads: int,
        num_classes: int,
        use_activation_checkpointing: bool,
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
        self.patch_embed = PatchEmbed3D(patch_size, tubelet_size, in_chans, embed_dim)

    def groups(self, keep: Tensor | None, grid: Grid) -> FoldedTokens | ScatteredTokens:
        """How the tokens of this grid, or those of them to keep [B, K], attend within frames and places."""
        if keep is None:
            return FoldedTokens(grid)
        return FoldedTokens(grid_of_tubes(keep, grid)) if self.tube_masks else ScatteredTokens(keep, grid)

    @torch.no_grad()
    def init_from_image_vit(self, image_vit: nn.Module, tubelet_init: TubeletInit = "central_frame") -> None:
        """Start as the image ViT of timm applied to frames; ViViT (Arnab et al. 2021), section 3.4.

        `tubelet_init` gives its patch embedding to the central frame of a tubelet, the others being zero (equation 9),
        or spreads it evenly over the frames ("filter inflation", equation 8). Positions in space are those of the
        image, interpolated if need be, the same at all times. Temporal attention that is a sub-layer of its own adds
        nothing at first: its last linear layer is zero. The head stays as it is. Raises ValueError for an image model
        of another size or kind.
        """
        if tubelet_init not in get_args(TubeletInit):
            raise ValueError(f"tubelet_init '{tubelet_init}': take one of {', '.join(get_args(TubeletInit))}")
        ours = (self.embed_dim, len(self.blocks), self.num_heads, self.patch_size)
        theirs = _image_vit_sizes(image_vit)
        if theirs != ours:
            raise ValueError(
                f"the image model's (width, depth, heads, patch size) are {theirs}, this encoder's {ours}; "
                "take an image ViT of the same size"
            )
        image = image_vit.patch_embed.proj
        kernel = self.patch_embed.proj.weight
        if tubelet_init == "filter_inflation":
            kernel.copy_(image.weight[:, :, None].expand_as(kernel) / self.tubelet_size)
        else:
            kernel.zero_()
            kernel[:, :, self.tubelet_size // 2] = image.weight
        self.patch_embed.proj.bias.copy_(image.bias)

        for block, source in zip(self.blocks, image_vit.blocks, strict=True):
            state = block.state_dict()
            state.update(source.state_dict())
            block.load_state_dict(state)
        self.norm.load_state_dict(image_vit.norm.state_dict())

        h, w = image_vit.patch_embed.grid_size
        position = image_vit.pos_embed[0]
        own_positions, of_patches = position[: -h * w], position[-h * w :]
        if self.cls_token is not None and image_vit.cls_token is not None:
            # Where the image model gives its CLS token a position, that is a sum of two constants.
            self.cls_token.copy_(image_vit.cls_token + own_positions.sum(0))
        table = interpolated(of_patches, (1, h, w), (1, *self.positions.grid[1:]))
        self.positions.table.copy_(table.repeat(self.positions.grid[0], 1))
        self.zero_init_temporal()

    @abstractmethod
    def zero_init_temporal(self) -> None:
        """Set to zero what an image model has no counterpart of, so that times do not mix at first."""


def _image_vit_sizes(image_vit: nn.Module) -> tuple[int, int, int, int]:
    """Width, depth, heads and patch size; ValueError where it is not a plain ViT of timm."""
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    plain_block = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    if not hasattr(image_vit, "blocks") or set(image_vit.blocks[0].state_dict()) != plain_block:
        raise ValueError(
            "this is no plain image ViT of timm: its blocks must hold norms, attention and MLP alone; "
            "take one such as timm's vit_base_patch16_224"
        )
    if image_vit.num_prefix_tokens > 1 or list(image_vit.norm_pre.parameters()):
        raise ValueError("this image ViT has registers or a norm before its blocks; take one without")
    if not isinstance(image_vit.norm, nn.LayerNorm):
        raise ValueError("this image ViT has no norm before its pooling; build it with fc_norm=False")
    num_heads = image_vit.blocks[0].attn.num_heads
    return image_vit.embed_dim, len(image_vit.blocks), num_heads, image_vit.patch_embed.patch_size[0]
