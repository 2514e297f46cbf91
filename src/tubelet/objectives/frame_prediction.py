"""Prediction of the frames that follow a clip, in pixels."""

from typing import Any, Literal, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.data import Batch
from tubelet.probing.encoder import fingerprint
from tubelet.runtime.checkpoint import CheckpointError
from tubelet.training.objective import Objective, StepRng

LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}


class FrameModel(Protocol):
    """A module that predicts frames: `FramePredictor`, or `FeatureDecoder` on top of a frozen V-JEPA."""

    def __call__(self, seen: Tensor, future: Tensor) -> Tensor:
        """Map frames seen [B, C, T, H, W] to those that follow, [B, C, horizon, H, W]."""

    def trained(self) -> nn.Module:
        """Return the module that learns; the rest of the model is its attribute `frozen`."""


class FramePrediction(Objective):
    """Trains a model that maps frames in [0, 1] to the frames that follow them.

    Args:
        model: The model.
        num_frames: Frames seen; the rest of each clip is to be predicted.
        channels: 3 for color, 1 for grayscale.
        loss: `l2` predicts the mean of the possible futures, `l1` the median.
    """

    fixed_targets = True

    def __init__(self, model: FrameModel, num_frames: int, channels: int = 3, loss: Literal["l1", "l2"] = "l2"):
        super().__init__()
        self.model, self.num_frames, self.channels, self.loss = model, num_frames, channels, loss

    def forward(self, batch: Batch, rng: StepRng) -> dict[str, Tensor]:
        """Compute the mean error over the frames to predict."""
        frames = to_frames(batch.clips, self.channels)
        seen, future = frames[:, :, : self.num_frames], frames[:, :, self.num_frames :]
        return {"loss": LOSSES[self.loss](self.model(seen, future).float(), future)}

    def parts(self) -> dict[str, nn.Module]:
        return {"model": self.model.trained()}

    def metadata(self) -> dict[str, Any]:
        """Return the hash of the frozen part of the model, which checkpoints do not store."""
        return {"frozen": fingerprint(self.model.frozen) if hasattr(self.model, "frozen") else None}

    def check_metadata(self, metadata: dict[str, Any]) -> None:
        if metadata["frozen"] != self.metadata()["frozen"]:
            raise CheckpointError(
                "pretrain.folder holds other weights than at the start of this run. Name the checkpoint used then with "
                "pretrain.checkpoint=…, or choose another folder=…"
            )


def to_frames(clips: Tensor, channels: int) -> Tensor:
    """Convert uint8 clips [B, 3, T, H, W] to floats in [0, 1], with 1 channel (grayscale) or 3."""
    frames = clips.float() / 255
    return frames.mean(dim=1, keepdim=True) if channels == 1 else frames
