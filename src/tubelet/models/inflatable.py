"""Video encoders that can be initialized from an image ViT of timm ("inflation")."""

from abc import abstractmethod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tubelet.grid import Grid
from tubelet.layers.groups import FoldedTokens, ScatteredTokens, tube_grid
from tubelet.layers.patch_embed import PatchEmbed3D
from tubelet.layers.positions import LearnedPositions, interpolate_positions
from tubelet.models.video_encoder import VideoEncoder

TubeletInit = Literal["central_frame", "filter_inflation"]


class InflatableEncoder(VideoEncoder):
    """Base class of video encoders that extend an image ViT of timm with temporal layers.

    Subclasses define the attributes below. `zero_init_temporal` must be able to disable all other layers.
    """

    blocks: nn.ModuleList
    norm: nn.Module
    cls_token: nn.Parameter | None
    positions: LearnedPositions

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
        """Return the attention over space and over time for all tokens of the grid or for `keep` [B, K]."""
        if keep is None:
            return FoldedTokens(grid)
        return FoldedTokens(tube_grid(keep, grid)) if self.tube_masks else ScatteredTokens(keep, grid)

    @torch.no_grad()
    def init_from_image_vit(self, image_vit: Any, tubelet_init: TubeletInit = "central_frame") -> None:
        """Initialize the encoder from an image ViT of timm, as in ViViT (Arnab et al. 2021), section 3.4.

        Spatial position embeddings are those of the image model, interpolated if the grid differs and repeated over
        time. Separate temporal attention layers initially contribute nothing: their last linear layer is zero. The head
        is not changed.

        Args:
            image_vit: Image ViT of timm with the same width, depth, heads and patch size.
            tubelet_init: `central_frame` copies the patch embedding to the central frame of a tubelet and sets the
                other frames to zero (equation 9). `filter_inflation` distributes it over all frames (equation 8).

        Raises:
            ValueError: If the image model has other sizes or is not a plain ViT.
        """
        if tubelet_init not in get_args(TubeletInit):
            raise ValueError(f"tubelet_init '{tubelet_init}': expected one of {', '.join(get_args(TubeletInit))}")
        sizes = (self.embed_dim, len(self.blocks), self.num_heads, self.patch_size)
        image_sizes = _image_vit_sizes(image_vit)
        if image_sizes != sizes:
            raise ValueError(
                f"(width, depth, heads, patch size) of the image model are {image_sizes}, of this encoder {sizes}; "
                "use an image ViT of the same size"
            )
        image = image_vit.patch_embed.proj
        kernel, bias = self.patch_embed.proj.weight, self.patch_embed.proj.bias
        assert bias is not None
        if tubelet_init == "filter_inflation":
            kernel.copy_(image.weight[:, :, None].expand_as(kernel) / self.tubelet_size)
        else:
            kernel.zero_()
            kernel[:, :, self.tubelet_size // 2] = image.weight
        bias.copy_(image.bias)

        for block, source in zip(self.blocks, image_vit.blocks, strict=True):
            state = block.state_dict()
            state.update(source.state_dict())
            block.load_state_dict(state)
        self.norm.load_state_dict(image_vit.norm.state_dict())

        h, w = image_vit.patch_embed.grid_size
        position = image_vit.pos_embed[0]
        cls_position, patch_positions = position[: -h * w], position[-h * w :]
        if self.cls_token is not None and image_vit.cls_token is not None:
            # The CLS token and its position embedding (if any) are constants, so their sum is a single parameter.
            self.cls_token.copy_(image_vit.cls_token + cls_position.sum(0))
        table = interpolate_positions(patch_positions, Grid(1, h, w), self.positions.grid._replace(t=1))
        self.positions.table.copy_(table.repeat(self.positions.grid.t, 1))
        self.zero_init_temporal()

    @abstractmethod
    def zero_init_temporal(self) -> None:
        """Zero the layers without counterpart in the image model, so that frames do not interact initially."""


def _image_vit_sizes(image_vit: Any) -> tuple[int, int, int, int]:
    """Return width, depth, heads and patch size.

    Raises:
        ValueError: If the model is not a plain ViT of timm.
    """
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    plain_block = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    if not hasattr(image_vit, "blocks") or set(image_vit.blocks[0].state_dict()) != plain_block:
        raise ValueError(
            "not a plain image ViT of timm: blocks must consist of norms, attention and MLP only; "
            "use e.g. timm's vit_base_patch16_224"
        )
    if image_vit.num_prefix_tokens > 1 or list(image_vit.norm_pre.parameters()):
        raise ValueError("this image ViT has register tokens or a norm before its blocks, which are not supported")
    if not isinstance(image_vit.norm, nn.LayerNorm):
        raise ValueError("this image ViT has no norm before pooling; create it with fc_norm=False")
    num_heads = image_vit.blocks[0].attn.num_heads
    return image_vit.embed_dim, len(image_vit.blocks), num_heads, image_vit.patch_embed.patch_size[0]
