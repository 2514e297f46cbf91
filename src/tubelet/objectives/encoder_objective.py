"""Objectives of a task on an encoder that is frozen or trained along."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from tubelet.data import Batch, to_float
from tubelet.models.interfaces import Encoder
from tubelet.training.objective import Objective
from tubelet.training.optimizer import layer_decay


class EncoderObjective(Objective):
    """Base class of objectives that read the tokens of an encoder.

    Args:
        encoder: Maps clips [B, C, T, H, W] to tokens [B, N, D]; None to leave the pictures out.
        mean: Mean of each color channel in [0, 1].
        std: Standard deviation of each color channel.
        frozen: Do not train the encoder.
        encoder_layer_decay: Factor on the learning rate from each block of the encoder to the one below it.
    """

    fixed_targets = True

    def __init__(
        self,
        encoder: Encoder | None,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        frozen: bool = False,
        encoder_layer_decay: float = 1.0,
    ):
        super().__init__()
        self.encoder = encoder
        self.mean, self.std = mean, std
        self.frozen, self.encoder_layer_decay = frozen, encoder_layer_decay
        if frozen and encoder is not None:
            encoder.requires_grad_(False)

    def encode(self, batch: Batch) -> Tensor:
        """Return the tokens [B, N, D] of the clips, without gradients where the encoder is frozen."""
        assert self.encoder is not None
        clips = to_float(batch.clips, self.mean, self.std)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.encoder(clips)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen and self.encoder is not None:
            self.encoder.eval()
        return self

    def lr_scales(self) -> Mapping[nn.Parameter, float]:
        if self.encoder is None or self.frozen or self.encoder_layer_decay == 1:
            return {}
        return layer_decay(self.encoder, self.encoder_layer_decay)

    def parts(self) -> dict[str, nn.Module]:
        """Return the trained modules; a frozen encoder is read anew at each start."""
        return {n: m for n, m in self.named_children() if any(p.requires_grad for p in m.parameters())}

    def encoders(self) -> dict[str, nn.Module]:
        return {} if self.encoder is None or self.frozen else {"encoder": self.encoder}
