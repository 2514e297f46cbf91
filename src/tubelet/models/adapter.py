"""Base class of the adapters for encoders of other libraries."""

from abc import ABC, abstractmethod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from tubelet.grid import Grid
from tubelet.models.interfaces import Encoder


class PretrainedEncoder(Encoder, ABC):
    """Adapter of a library model to the encoder interface of this package.

    Args:
        model: The model.
        embed_dim: Width D of its tokens.
        num_heads: Number of heads for a predictor or probe on top of it.
        head: Attribute name of the model's classification head, which is removed if `num_classes` is 0.
        num_classes: Classes of the head; 0 for no head.
        weights: File with the weights of the model; random weights if None.

    Raises:
        ValueError: If the weights file cannot be read or does not match the model.
    """

    accepts_masks = False
    model: Any

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
        """Return the token grid (t, h, w) of a clip.

        Raises:
            ValueError: If the clip is too small, or the patch size does not divide it.
        """

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """Return the last features of the model for clips [B, C, T, H, W], in the layout of the library."""

    @abstractmethod
    def tokens(self, features: Tensor) -> Tensor:
        """Convert the output of `features` to tokens [B, N, D] in time-major order."""

    @abstractmethod
    def classify(self, features: Tensor) -> Tensor:
        """Apply the library's pooling and head to the output of `features`; return logits [B, num_classes]."""

    def forward(self, x: Tensor, masks: None = None) -> Tensor:
        """Return logits [B, num_classes] for clips [B, C, T, H, W], or tokens [B, N, D] if `num_classes` is 0."""
        if self.num_classes == 0:
            return self.forward_features(x, masks)
        return self.classify(self._checked_features(x, masks))

    def forward_features(self, x: Tensor, masks: None = None) -> Tensor:
        """Return tokens [B, N, D] for clips [B, C, T, H, W]."""
        return self.tokens(self._checked_features(x, masks))

    def _checked_features(self, x: Tensor, masks: None) -> Tensor:
        if masks is not None:
            raise ValueError(
                f"{type(self).__name__} needs all tokens of a clip and takes no masks; use e.g. a vision_transformer"
            )
        if x.ndim != 5:
            raise ValueError(
                f"this encoder takes clips [B, C, T, H, W], not {list(x.shape)}; repeat an image over the frames"
            )
        self.grid_size(*x.shape[2:])
        return self.features(x)

    def _adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert a state dict of the library to the current model."""
        return state

    def _load(self, path: Path, head: str) -> None:
        state = self._adapt(_read(path))
        model_state = self.model.state_dict()
        head_names = {name for name in state if name.startswith(f"{head}.")}
        if any(name not in model_state or model_state[name].shape != state[name].shape for name in head_names):
            state = {name: value for name, value in state.items() if name not in head_names}
            state |= {name: value for name, value in model_state.items() if name.startswith(f"{head}.")}
        try:
            # On the meta device, used to validate configurations, values cannot be copied; assigning checks the names
            # and shapes.
            self.model.load_state_dict(state, assign=next(self.model.parameters()).is_meta)
        except RuntimeError as error:
            raise ValueError(f"weights {path}: do not match this {type(self.model).__name__}: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file or a pickle of tensors.

    Raises:
        ValueError: If the file does not exist or is not a state dict.
    """
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file; weights are not downloaded, save those of the library there")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"weights {path}: cannot be read as a state dict: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"weights {path}: contains a {type(state).__name__}, not a state dict")
    return state
