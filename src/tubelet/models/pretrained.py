"""Adapters for encoders of other libraries: Video Swin, MViT v2, R3D-18 and S3D of torchvision, image ViTs of timm.

They return the tokens of the library's model in time-major order. They need all tokens of a clip, so they cannot be
used with masks (`accepts_masks` is False). To inflate an image ViT of timm to tubelets, see
`ViViT.init_from_image_vit`.

All factories accept `weights`, a local file with the weights of the library (.pth, .pt or .safetensors). Nothing is
downloaded. The head in the file is used if it has `num_classes` classes and ignored otherwise. `patch_size` and
`tubelet_size` apply to the image ViTs only; the other models have fixed strides, see `grid_size`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import timm
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models import video
from torchvision.models.video.mvit import MSBlockConfig

from tubelet.config import nearest
from tubelet.grid import ClipShape, Grid, as_pair
from tubelet.models.adapter import PretrainedEncoder


class VideoSwin(PretrainedEncoder):
    """Video Swin (Liu et al. 2022): windowed attention; patch merging after every stage.

    With the four stages of the paper, a token covers 2 frames x 32 x 32 pixels.

    Args:
        embed_dim: Width of the first stage; it doubles with every stage.
        depths: Number of blocks of each stage.
        head_dim: Channels per attention head; must divide `embed_dim`.
        window_size: Window size in tokens: frames, rows, columns.
        patch: Patch size in frames, rows and columns of pixels.
        drop_path_rate: Stochastic depth rate of the last block; it increases linearly with depth.
        init_std: Standard deviation of the initial weights of linear layers (truncated normal).
        num_classes: Classes of the head; 0 for no head, so that the encoder returns tokens.
        weights: File with weights of torchvision; random weights if None.

    Raises:
        ValueError: If `head_dim` does not divide `embed_dim`, or the weights do not match.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        head_dim: int = 32,
        window_size: Sequence[int] = (8, 7, 7),
        patch: Sequence[int] = (2, 4, 4),
        drop_path_rate: float = 0.1,
        init_std: float = 0.02,
        num_classes: int = 0,
        weights: str | None = None,
    ):
        if embed_dim % head_dim:
            raise ValueError(f"head_dim {head_dim} does not divide embed_dim {embed_dim}; change one of them")
        num_heads = [embed_dim * 2**stage // head_dim for stage in range(len(depths))]
        model = video.SwinTransformer3d(
            list(patch),
            embed_dim,
            list(depths),
            num_heads,
            list(window_size),
            stochastic_depth_prob=drop_path_rate,
            num_classes=max(num_classes, 1),
        )
        _init_linear(model, init_std)
        super().__init__(model, model.num_features, num_heads[-1], "head", num_classes, weights)
        self.patch = tuple(patch)
        self.merged = 2 ** (len(depths) - 1)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        frames, rows, columns = self.patch
        if num_frames % frames or height % rows or width % columns:
            raise ValueError(
                f"{num_frames} frames of {height}x{width} pixels cannot be cut into patches of "
                f"{frames}x{rows}x{columns} for Video Swin; use multiples of these"
            )
        return Grid(num_frames // frames, -(-height // (rows * self.merged)), -(-width // (columns * self.merged)))

    def features(self, x: Tensor) -> Tensor:
        m = self.model
        return m.norm(m.features(m.pos_drop(m.patch_embed(x))))  # [B, t, h, w, D]

    def tokens(self, features: Tensor) -> Tensor:
        return features.flatten(1, 3)

    def classify(self, features: Tensor) -> Tensor:
        return self.model.head(features.mean((1, 2, 3)))


class MViT(PretrainedEncoder):
    """MViT v2 (Li et al. 2022).

    With the four stages of the paper, a token covers 2 frames x 32 x 32 pixels. The model is built for 16 frames of
    224 x 224 pixels like the weights of the library. For other clips its relative positions are interpolated, which
    the forward pass of the library does not support.

    As in the library, the head reads the CLS token only. The parameters of the last block that only affect patch
    queries then have no influence on the logits and are not trained.

    Args:
        embed_dim: Width of the first stage, which has one head. Both double with every stage, while the number of rows
            and columns halves.
        depths: Number of blocks of each stage.
        drop_path_rate: Stochastic depth rate of the last block; it increases linearly with depth.
        init_std: Standard deviation of the initial weights of linear layers (truncated normal).
        num_classes: Classes of the head; 0 for no head, so that the encoder returns tokens.
        weights: File with weights of torchvision; random weights if None.

    Raises:
        ValueError: If the weights do not match.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (1, 2, 11, 2),
        drop_path_rate: float = 0.2,
        init_std: float = 0.02,
        num_classes: int = 0,
        weights: str | None = None,
    ):
        model = video.MViT(
            spatial_size=(224, 224),
            temporal_size=16,
            block_setting=_mvit_blocks(embed_dim, depths),
            residual_pool=True,
            residual_with_cls_embed=False,
            rel_pos_embed=True,
            proj_after_attn=True,
            stochastic_depth_prob=drop_path_rate,
            num_classes=max(num_classes, 1),
        )
        _init_linear(model, init_std)
        last = model.blocks[-1].attn
        super().__init__(model, last.output_dim, last.num_heads, "head", num_classes, weights)
        self.stride = 4 * 2 ** (len(depths) - 1)
        if num_classes:
            for parameter in (last.rel_pos_t, last.rel_pos_h, last.rel_pos_w, last.pool_q.pool.weight):
                parameter.requires_grad_(False)  # DistributedDataParallel expects a gradient for every parameter

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        return Grid(-(-num_frames // 2), -(-height // self.stride), -(-width // self.stride))

    def features(self, x: Tensor) -> Tensor:
        m = self.model
        x = m.conv_proj(x)
        grid = tuple(x.shape[2:])
        x = m.pos_encoding(x.flatten(2).transpose(1, 2))  # adds the CLS token; positions are part of the attention
        with x.device:  # torchvision makes its indices of relative positions without naming a device
            for block in m.blocks:
                x, grid = block(x, grid)
        return m.norm(x)  # [B, 1 + N, D]

    def tokens(self, features: Tensor) -> Tensor:
        return features[:, 1:]

    def classify(self, features: Tensor) -> Tensor:
        return self.model.head(features[:, 0])


class R3D(PretrainedEncoder):
    """3D ResNet with 18 layers (Tran et al. 2018); a token covers 8 frames x 16 x 16 pixels.

    Args:
        num_classes: Classes of the head; 0 for no head, so that the encoder returns tokens.
        weights: File with weights of torchvision; random weights if None.

    Raises:
        ValueError: If the weights do not match.
    """

    def __init__(self, num_classes: int = 0, weights: str | None = None):
        model = video.r3d_18(num_classes=max(num_classes, 1))
        super().__init__(model, model.fc.in_features, model.fc.in_features // 64, "fc", num_classes, weights)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        return Grid(-(-num_frames // 8), -(-height // 16), -(-width // 16))

    def features(self, x: Tensor) -> Tensor:
        m = self.model
        return m.layer4(m.layer3(m.layer2(m.layer1(m.stem(x)))))  # [B, D, t, h, w]

    def tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)

    def classify(self, features: Tensor) -> Tensor:
        return self.model.fc(features.mean((2, 3, 4)))


class S3D(PretrainedEncoder):
    """Separable 3D Inception, S3D (Xie et al. 2018); a token covers 8 frames x 32 x 32 pixels.

    Clips need at least 5 frames of 17 x 17 pixels. As in the library, logits are averaged over windows of 2 x 7 x 7
    tokens, and over smaller windows for smaller clips.

    Args:
        norm_momentum: Momentum of batch normalization. With the default of the library, running statistics adapt over
            thousands of steps; use a larger value for short training runs.
        num_classes: Classes of the head; 0 for no head, so that the encoder returns tokens.
        weights: File with weights of torchvision; random weights if None.

    Raises:
        ValueError: If the weights do not match.
    """

    def __init__(self, norm_momentum: float = 0.001, num_classes: int = 0, weights: str | None = None):
        norm = partial(nn.BatchNorm3d, eps=0.001, momentum=norm_momentum)
        model = video.S3D(max(num_classes, 1), norm_layer=norm)
        embed_dim = model.classifier[1].in_channels
        super().__init__(model, embed_dim, embed_dim // 64, "classifier", num_classes, weights)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        # The strides round up; the last pooling halves the size and rounds down.
        grid = Grid(-(-num_frames // 4) // 2, -(-height // 16) // 2, -(-width // 16) // 2)
        if 0 in grid:
            raise ValueError(
                f"{num_frames} frames of {height}x{width} pixels are too small for S3D; "
                "use at least 5 frames of 17x17 pixels"
            )
        return grid

    def features(self, x: Tensor) -> Tensor:
        return self.model.features(x)  # [B, D, t, h, w]

    def tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)

    def classify(self, features: Tensor) -> Tensor:
        window = [min(maximum, size) for maximum, size in zip((2, 7, 7), features.shape[2:], strict=True)]
        return self.model.classifier(F.avg_pool3d(features, window, stride=1)).mean((2, 3, 4))


class FramewiseViT(PretrainedEncoder):
    """Image ViT of timm applied to every frame; tokens are averaged over tubelets and logits over all frames.

    Position embeddings are interpolated for other image sizes.

    Args:
        timm_name: Name of the model in timm, such as vit_base_patch16_224.
        img_size: Frame size in pixels: the side of a square or (height, width).
        num_frames: Frames per clip.
        patch_size: Side of a patch in pixels.
        tubelet_size: Number of consecutive frames whose tokens are averaged.
        num_classes: Classes of the head; 0 for no head, so that the encoder returns tokens.
        weights: File with weights of timm; random weights if None.

    Raises:
        ValueError: If `timm_name` is not an image ViT of timm, sizes are incompatible, or the weights do not match.
    """

    def __init__(
        self,
        timm_name: str,
        img_size: int | tuple[int, int] = 224,
        num_frames: int = 16,
        patch_size: int = 16,
        tubelet_size: int = 2,
        num_classes: int = 0,
        weights: str | None = None,
    ):
        if not timm.is_model(timm_name):
            raise ValueError(f"timm_name '{timm_name}': unknown to timm. {nearest(timm_name, timm.list_models())}")
        if timm.model_entrypoint(timm_name).__module__ != VisionTransformer.__module__:
            raise ValueError(f"timm_name '{timm_name}': not an image ViT; use one such as vit_base_patch16_224")
        height, width = as_pair(img_size)
        model: Any = timm.create_model(
            timm_name, img_size=(height, width), patch_size=patch_size, num_classes=num_classes, dynamic_img_size=True
        )
        super().__init__(model, model.embed_dim, model.blocks[-1].attn.num_heads, "head", num_classes, weights)
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.grid_size(num_frames, height, width)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        return ClipShape(num_frames, (height, width), self.patch_size, self.tubelet_size).video_grid

    def features(self, x: Tensor) -> Tensor:
        T = x.shape[2]
        y = self.model.forward_features(rearrange(x, "B C T H W -> (B T) C H W"))
        return rearrange(y, "(B T) n D -> B T n D", T=T)  # including the CLS token

    def tokens(self, features: Tensor) -> Tensor:
        patches = features[:, :, self.model.num_prefix_tokens :]
        return rearrange(patches, "B (t s) n D -> B t s n D", s=self.tubelet_size).mean(2).flatten(1, 2)

    def classify(self, features: Tensor) -> Tensor:
        return self.model.forward_head(features.flatten(0, 1)).unflatten(0, features.shape[:2]).mean(1)

    def _adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert older checkpoints, and patches and positions of other sizes, with timm's own filter."""
        return checkpoint_filter_fn(state, self.model)


def _mvit_blocks(embed_dim: int, depths: Sequence[int]) -> list[MSBlockConfig]:
    """Return the block settings of MViT v2.

    The first block of a stage halves rows and columns. Keys are pooled to the same number in all stages.
    """
    blocks, width = [], embed_dim
    for stage, depth in enumerate(depths):
        stage_width, stride_kv = embed_dim * 2**stage, 2 ** (len(depths) - 1 - stage)
        for block in range(depth):
            stride_q = 2 if stage > 0 and block == 0 else 1
            blocks.append(
                MSBlockConfig(
                    num_heads=2**stage,
                    input_channels=width,
                    output_channels=stage_width,
                    kernel_q=[3, 3, 3],
                    kernel_kv=[3, 3, 3],
                    stride_q=[1, stride_q, stride_q],
                    stride_kv=[1, stride_kv, stride_kv],
                )
            )
            width = stage_width
    return blocks


def _init_linear(model: nn.Module, std: float) -> None:
    """Initialize linear layers as torchvision does for transformers, but with a configurable deviation."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)


video_swin_tiny = partial(VideoSwin)
video_swin_small = partial(VideoSwin, depths=(2, 2, 18, 2))
video_swin_base = partial(VideoSwin, embed_dim=128, depths=(2, 2, 18, 2))
mvit_v2_small = partial(MViT)
r3d_18 = partial(R3D)
s3d = partial(S3D)
image_vit_tiny = partial(FramewiseViT, timm_name="vit_tiny_patch16_224")
image_vit_small = partial(FramewiseViT, timm_name="vit_small_patch16_224")
image_vit_base = partial(FramewiseViT, timm_name="vit_base_patch16_224")
