"""What encoders of clips share: sizes, lists of masks, the head."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from tubelet.layers.block import run_block
from tubelet.layers.checks import head_width, token_grid
from tubelet.layers.positions import Grid


class VideoEncoder(nn.Module, ABC):
    """Clips [B, C, T, H, W] to tokens; a subclass computes them in `encode`. With `num_classes` there is a linear head.

    `tube_masks` may be set to True by who knows that all masks are tubes: the same places in every time slot, in
    time-major order. Then tokens keep a (time, place) grid, and attention within frames, places or windows needs no
    mask over all kept tokens. The numbers are the same. Other masks are an error then, on a GPU one that comes late.

    torch.compile makes one graph of a pass, with or without masks, unless a subclass says otherwise. Raises
    ValueError for sizes that patches or tubelets do not fill, and for heads that do not divide the width.
    """

    accepts_masks = True
    tube_masks = False

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int,
        num_frames: int,
        tubelet_size: int,
        embed_dim: int,
        num_heads: int,
        num_classes: int,
        use_activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.tubelet_size = tubelet_size
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = head_width(embed_dim, num_heads)
        self.use_activation_checkpointing = use_activation_checkpointing
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = self.grid_size(num_frames, height, width)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else None

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Tokens along time, rows and columns of a clip; ValueError where patches or tubelets do not fill it."""
        return token_grid(num_frames, height, width, self.tubelet_size, self.patch_size)

    def forward(self, video: Tensor, masks: Tensor | list[Tensor] | None = None) -> Tensor | list[Tensor]:
        """Logits [B, num_classes], or without num_classes the tokens of `forward_features`; for lists of masks, lists.

        With masks the head knows the kept tokens only.
        """
        if isinstance(masks, list):
            return [self.forward(video, keep) for keep in masks]
        tokens, clip = self._encode(video, masks)
        return tokens if self.head is None else self.head(clip)

    def forward_features(self, video: Tensor, masks: Tensor | list[Tensor] | None = None) -> Tensor | list[Tensor]:
        """Clips -> tokens [B, N, D] in time-major order.

        With `masks` [B, K], the indices of the tokens to keep, [B, K, D]: the others are never computed. With a list of
        masks, a list.
        """
        if isinstance(masks, list):
            return [self.forward_features(video, keep) for keep in masks]
        return self._encode(video, masks)[0]

    @abstractmethod
    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Clips [B, C, T, H, W] of this grid -> the normed tokens [B, N, D], or [B, K, D] for `keep` [B, K]; and where
        there is a head what it reads, [B, D].
        """

    def channels_first(self, video: Tensor) -> Tensor:
        """The clips as [B, C, T, H, W]; ValueError where they are none."""
        if video.ndim != 5:
            raise ValueError(
                f"this encoder takes clips [B, C, T, H, W], not {list(video.shape)}; repeat an image over the frames"
            )
        return video

    def run(self, block: nn.Module, x: Tensor, *how) -> Tensor:
        """`block(x, *how)`, with activation checkpointing if that is on."""
        return run_block(block, x, *how, save_memory=self.use_activation_checkpointing and self.training)

    def _encode(self, video: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        video = self.channels_first(video)
        return self.encode(video, keep, self.grid_size(*video.shape[2:]))
