"""Base class of clip encoders: sizes, lists of masks, classification head."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from tubelet.grid import ClipShape, Grid, as_pair
from tubelet.layers.block import run_block
from tubelet.layers.checks import head_width
from tubelet.models.interfaces import Encoder


class VideoEncoder(Encoder, ABC):
    """Base class of encoders of clips [B, C, T, H, W]. Subclasses implement `encode`.

    torch.compile captures a forward pass in a single graph, with or without masks, unless a subclass documents
    otherwise.

    Args:
        img_size: Frame size in pixels: the side of a square or (height, width).
        patch_size: Side of a patch in pixels.
        num_frames: Frames per clip.
        tubelet_size: Frames per token.
        embed_dim: Width D of the tokens.
        num_heads: Attention heads per block; must divide `embed_dim`.
        num_classes: Classes of a linear head; 0 for no head, so that the encoder returns tokens.
        use_activation_checkpointing: Recompute activations in the backward pass to save memory.

    Raises:
        ValueError: If the patch or tubelet size does not divide the clip size, or `num_heads` does not divide
            `embed_dim`.
    """

    accepts_masks = True
    tube_masks = False
    """Set to True if all masks are tubes: the same spatial locations in every frame, in time-major order.

    Kept tokens then form a (time, location) grid, and attention within frames, locations or windows is folded instead
    of masked. The output is the same. Any other mask is an error then; on a GPU it is raised asynchronously.
    """

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
        self.grid = self.grid_size(num_frames, *as_pair(img_size))
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else None

    def grid_size(self, num_frames: int, height: int, width: int) -> Grid:
        """Return the token grid (t, h, w) of a clip.

        Raises:
            ValueError: If the tubelet or patch size does not divide the clip size.
        """
        return ClipShape(num_frames, (height, width), self.patch_size, self.tubelet_size).video_grid

    def forward(self, video: Tensor, masks: Tensor | list[Tensor] | None = None) -> Tensor | list[Tensor]:
        """Encode clips, and classify them if the encoder has a head.

        Args:
            video: Clips [B, C, T, H, W].
            masks: Indices [B, K] of the tokens to keep, or a list of such masks; all tokens if None.

        Returns:
            Logits [B, num_classes], or the tokens of `forward_features` if `num_classes` is 0. A list of these for a
            list of masks.
        """
        if isinstance(masks, list):
            return [self._predict(video, keep) for keep in masks]
        return self._predict(video, masks)

    def forward_features(self, video: Tensor, masks: Tensor | list[Tensor] | None = None) -> Tensor | list[Tensor]:
        """Encode clips.

        Args:
            video: Clips [B, C, T, H, W].
            masks: Indices [B, K] of the tokens to keep, or a list of such masks; all tokens if None. Dropped tokens are
                never computed.

        Returns:
            Tokens [B, N, D] in time-major order, or [B, K, D] in the order of the mask. A list of these for a list of
            masks.
        """
        if isinstance(masks, list):
            return [self._encode(video, keep)[0] for keep in masks]
        return self._encode(video, masks)[0]

    @abstractmethod
    def encode(self, video: Tensor, keep: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor | None]:
        """Encode clips with one mask.

        Args:
            video: Clips [B, C, T, H, W].
            keep: Indices [B, K] of the tokens to keep; all tokens if None.
            grid: Token grid (t, h, w) of the clips.

        Returns:
            The normalized tokens [B, N, D] or [B, K, D], and the input of the head [B, D] (may be None without head).
        """

    def channels_first(self, video: Tensor) -> Tensor:
        """Return the clips as [B, C, T, H, W].

        Raises:
            ValueError: If `video` does not have five dimensions.
        """
        if video.ndim != 5:
            raise ValueError(
                f"this encoder takes clips [B, C, T, H, W], not {list(video.shape)}; repeat an image over the frames"
            )
        return video

    def run(self, block: nn.Module, x: Tensor, *args: Any) -> Tensor:
        """Call `block(x, *args)`, with activation checkpointing if it is enabled."""
        return run_block(block, x, *args, use_checkpoint=self.use_activation_checkpointing and self.training)

    def _predict(self, video: Tensor, keep: Tensor | None) -> Tensor:
        tokens, pooled = self._encode(video, keep)
        return tokens if self.head is None else self.head(pooled)

    def _encode(self, video: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        video = self.channels_first(video)
        return self.encode(video, keep, self.grid_size(*video.shape[2:]))
