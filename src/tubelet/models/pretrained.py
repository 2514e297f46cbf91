"""Encoders that other libraries keep: Video Swin, MViT v2, R3D-18 and S3D of torchvision, image ViTs of timm.

Thin adapters: the library's model, its tokens in time-major order. They need the whole clip (`accepts_masks` False). A
ViT of timm inflated to tubelets is ViViT's `init_from_image_vit`.

`weights` of every factory is a local file of the library's own weights (.pth, .pt, .safetensors); nothing is ever
downloaded. Its head is taken where it has `num_classes` classes, else left out. `patch_size` and `tubelet_size` act on
the image ViTs alone: the others have strides of their own, see `grid_size`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pickle import UnpicklingError

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torchvision.models import video
from torchvision.models.video.mvit import MSBlockConfig

from tubelet.config import nearest
from tubelet.layers.checks import token_grid
from tubelet.layers.positions import Grid


class PretrainedEncoder(nn.Module, ABC):
    """A library's model behind this package's contract; `num_heads` is what a predictor or probe on top takes.

    `head` names the model's classification head, which goes where `num_classes` is 0. Raises ValueError for a weights
    file that cannot be read or does not fit.
    """

    accepts_masks = False

    def __init__(
        self, model: nn.Module, embed_dim: int, num_heads: int, head: str, num_classes: int, weights: str | None
    ):
        super().__init__()
        self.model = model
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_classes = num_classes
        if num_classes == 0:
            setattr(model, head, nn.Identity())
        if weights is not None:
            self._load(Path(weights), head)

    @abstractmethod
    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along time, rows and columns of a clip; ValueError where it is too small or patches do not fill it."""

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Clips [B, C, T, H, W] -> the model's last features, laid out as in the library."""

    @abstractmethod
    def tokens(self, features: Tensor) -> Tensor:
        """[B, N, D] in time-major order."""

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """The library's own pooling and head: [B, num_classes]."""

    def forward(self, x: Tensor, masks: None = None) -> Tensor:
        """Clips [B, C, T, H, W] -> logits [B, num_classes], or without num_classes tokens [B, N, D]."""
        if self.num_classes == 0:
            return self.forward_features(x, masks)
        return self.classify(self._checked_features(x, masks))

    def forward_features(self, x: Tensor, masks: None = None) -> Tensor:
        """Clips [B, C, T, H, W] -> tokens [B, N, D]."""
        return self.tokens(self._checked_features(x, masks))

    def _checked_features(self, x: Tensor, masks: None) -> Tensor:
        if masks is not None:
            raise ValueError(
                f"{type(self).__name__} needs the whole clip and takes no masks; take a vision_transformer"
            )
        if x.ndim != 5:
            raise ValueError(
                f"this encoder takes clips [B, C, T, H, W], not {list(x.shape)}; repeat an image over the frames"
            )
        self.grid_size(*x.shape[2:])
        return self.features(x)

    def _adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights as in the file -> as the model takes them."""
        return state

    def _load(self, path: Path, head: str) -> None:
        state = self._adapt(_read(path))
        own = self.model.state_dict()
        of_head = {name for name in state if name.startswith(f"{head}.")}
        if any(name not in own or own[name].shape != state[name].shape for name in of_head):
            state = {name: value for name, value in state.items() if name not in of_head}
            state |= {name: value for name, value in own.items() if name.startswith(f"{head}.")}
        try:
            # On the meta device, where configurations are checked, nothing can be copied; names and shapes are checked.
            self.model.load_state_dict(state, assign=next(self.model.parameters()).is_meta)
        except RuntimeError as error:
            raise ValueError(f"weights {path}: not of {type(self.model).__name__} of this size: {error}") from error


class VideoSwin(PretrainedEncoder):
    """Video Swin (Liu et al. 2022): windowed attention, and after every stage four neighbours become one token.

    `patch` is frames x rows x columns; `depths` are the blocks of the stages, the first of width `embed_dim`, each
    further one twice as wide. With the paper's four stages a token is 2 frames x 32 x 32 pixels.
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
            raise ValueError(f"heads of width {head_dim} do not divide the width {embed_dim}; change head_dim")
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
                f"{num_frames} frames of {height}x{width} pixels cannot be cut into Video Swin's patches of "
                f"{frames}x{rows}x{columns}; take multiples of these"
            )
        return num_frames // frames, -(-height // (rows * self.merged)), -(-width // (columns * self.merged))

    def features(self, x: Tensor) -> Tensor:
        m = self.model
        return m.norm(m.features(m.pos_drop(m.patch_embed(x))))  # [B, t, h, w, D]

    def tokens(self, features: Tensor) -> Tensor:
        return features.flatten(1, 3)

    def classify(self, features: Tensor) -> Tensor:
        return self.model.head(features.mean((1, 2, 3)))


class MViT(PretrainedEncoder):
    """MViT v2 (Li et al. 2022); with four stages as in the paper a token is 2 frames x 32 x 32 pixels.

    `depths` are the blocks of the stages; the first stage has width `embed_dim` and one head, each further one twice
    as many, and a quarter of the places. Built for 16 frames of 224 x 224 pixels as the library's weights are; for
    other clips its relative positions are interpolated, which the library's own forward pass does not offer. The head
    reads the CLS token alone. What the last block has for the queries of patches then changes no logit, as in the
    library, and is not trained.
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
                parameter.requires_grad_(False)  # DistributedDataParallel waits for the gradient of what requires one

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        return -(-num_frames // 2), -(-height // self.stride), -(-width // self.stride)

    def features(self, x: Tensor) -> Tensor:
        m = self.model
        x = m.conv_proj(x)
        grid = tuple(x.shape[2:])
        x = m.pos_encoding(x.flatten(2).transpose(1, 2))  # the CLS token; positions are in the attention
        for block in m.blocks:
            x, grid = block(x, grid)
        return m.norm(x)  # [B, 1 + N, D]

    def tokens(self, features: Tensor) -> Tensor:
        return features[:, 1:]

    def classify(self, features: Tensor) -> Tensor:
        return self.model.head(features[:, 0])


class R3D(PretrainedEncoder):
    """3D ResNet of 18 layers (Tran et al. 2018); positions of 8 frames x 16 x 16 pixels are the tokens."""

    def __init__(self, num_classes: int = 0, weights: str | None = None):
        model = video.r3d_18(num_classes=max(num_classes, 1))
        super().__init__(model, model.fc.in_features, model.fc.in_features // 64, "fc", num_classes, weights)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        return -(-num_frames // 8), -(-height // 16), -(-width // 16)

    def features(self, x: Tensor) -> Tensor:
        m = self.model
        return m.layer4(m.layer3(m.layer2(m.layer1(m.stem(x)))))  # [B, D, t, h, w]

    def tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)

    def classify(self, features: Tensor) -> Tensor:
        return self.model.fc(features.mean((2, 3, 4)))


class S3D(PretrainedEncoder):
    """Separable 3D Inception (Xie et al. 2018); positions of 8 frames x 32 x 32 pixels are the tokens.

    A clip has at least 5 frames of 17 x 17 pixels. Logits are averaged over windows of 2 x 7 x 7 positions as in the
    library, and over smaller ones where there are fewer. `norm_momentum` is the library's: batch normalisation follows
    the data over thousands of steps, so a short training wants more.
    """

    def __init__(self, norm_momentum: float = 0.001, num_classes: int = 0, weights: str | None = None):
        norm = partial(nn.BatchNorm3d, eps=0.001, momentum=norm_momentum)
        model = video.S3D(max(num_classes, 1), norm_layer=norm)
        embed_dim = model.classifier[1].in_channels
        super().__init__(model, embed_dim, embed_dim // 64, "classifier", num_classes, weights)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        # Halved once more, rounded down, after strides that round up.
        grid = (-(-num_frames // 4) // 2, -(-height // 16) // 2, -(-width // 16) // 2)
        if 0 in grid:
            raise ValueError(
                f"{num_frames} frames of {height}x{width} pixels are too few for S3D; "
                "take at least 5 frames of 17x17 pixels"
            )
        return grid

    def features(self, x: Tensor) -> Tensor:
        return self.model.features(x)  # [B, D, t, h, w]

    def tokens(self, features: Tensor) -> Tensor:
        return features.flatten(2).transpose(1, 2)

    def classify(self, features: Tensor) -> Tensor:
        window = [min(most, size) for most, size in zip((2, 7, 7), features.shape[2:], strict=True)]
        return self.model.classifier(F.avg_pool3d(features, window, stride=1)).mean((2, 3, 4))


class FramewiseViT(PretrainedEncoder):
    """An image ViT of timm on every frame; tokens are averaged over the frames of a tubelet, logits over all frames.

    `timm_name` is a name of timm's, such as vit_base_patch16_224. Positions are interpolated for other image sizes.
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
            raise ValueError(
                f"timm_name '{timm_name}': timm has no such model. {nearest(timm_name, timm.list_models())}"
            )
        if timm.model_entrypoint(timm_name).__module__ != VisionTransformer.__module__:
            raise ValueError(f"timm_name '{timm_name}': not an image ViT; take one such as vit_base_patch16_224")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        model = timm.create_model(
            timm_name, img_size=(height, width), patch_size=patch_size, num_classes=num_classes, dynamic_img_size=True
        )
        super().__init__(model, model.embed_dim, model.blocks[-1].attn.num_heads, "head", num_classes, weights)
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.grid_size(num_frames, height, width)

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        return token_grid(num_frames, height, width, self.tubelet_size, self.patch_size)

    def features(self, x: Tensor) -> Tensor:
        T = x.shape[2]
        y = self.model.forward_features(rearrange(x, "B C T H W -> (B T) C H W"))
        return rearrange(y, "(B T) n D -> B T n D", T=T)  # with the CLS token

    def tokens(self, features: Tensor) -> Tensor:
        patches = features[:, :, self.model.num_prefix_tokens :]
        return rearrange(patches, "B (t s) n D -> B t s n D", s=self.tubelet_size).mean(2).flatten(1, 2)

    def classify(self, features: Tensor) -> Tensor:
        return self.model.forward_head(features.flatten(0, 1)).unflatten(0, features.shape[:2]).mean(1)

    def _adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's own conversion of older files, and of patches and positions of another size."""
        return checkpoint_filter_fn(state, self.model)


def _mvit_blocks(embed_dim: int, depths: Sequence[int]) -> list[MSBlockConfig]:
    """A stage's first block halves rows and columns; keys are pooled to the same number in all stages."""
    blocks, width = [], embed_dim
    for stage, depth in enumerate(depths):
        own_width, stride_kv = embed_dim * 2**stage, 2 ** (len(depths) - 1 - stage)
        for block in range(depth):
            stride_q = 2 if stage > 0 and block == 0 else 1
            blocks.append(
                MSBlockConfig(
                    num_heads=2**stage,
                    input_channels=width,
                    output_channels=own_width,
                    kernel_q=[3, 3, 3],
                    kernel_kv=[3, 3, 3],
                    stride_q=[1, stride_q, stride_q],
                    stride_kv=[1, stride_kv, stride_kv],
                )
            )
            width = own_width
    return blocks


def _init_linear(model: nn.Module, std: float) -> None:
    """What torchvision's transformers do with a deviation of 0.02, which is too little for narrow ones."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file; save the library's weights there, nothing is downloaded")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"weights {path}: cannot be read as weights: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"weights {path}: holds a {type(state).__name__}, not a state dict")
    return state


video_swin_tiny = partial(VideoSwin)
video_swin_small = partial(VideoSwin, depths=(2, 2, 18, 2))
video_swin_base = partial(VideoSwin, embed_dim=128, depths=(2, 2, 18, 2))
mvit_v2_small = partial(MViT)
r3d_18 = partial(R3D)
s3d = partial(S3D)
image_vit_tiny = partial(FramewiseViT, timm_name="vit_tiny_patch16_224")
image_vit_small = partial(FramewiseViT, timm_name="vit_small_patch16_224")
image_vit_base = partial(FramewiseViT, timm_name="vit_base_patch16_224")
