"""A model that is trained to predict frames, such as the generative TimeSformer, on frames from 0 to 1."""

from torch import Tensor, nn

from tubelet.config import ConfigError
from tubelet.config.registry import PartOptions
from tubelet.grid import ClipShape
from tubelet.models import build_encoder


class FramePredictor(nn.Module):
    """Frames seen [B, C, T, H, W] with values from 0 to 1 -> the frames that follow, [B, C, horizon, H, W].

    The first are normalised with `mean` and `std` for the model; its answer is taken as it is.
    """

    is_stochastic = False
    """Whether it has several answers."""

    def __init__(self, model: nn.Module, mean: float, std: float):
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, seen: Tensor, future: Tensor | None = None, draw: int | None = None) -> Tensor:
        """`future` and `draw` are for models that learn from the one or have several answers; see `FeatureDecoder`."""
        return self.model((seen - self.mean) / self.std)

    def trained(self) -> nn.Module:
        """What a checkpoint keeps."""
        return self.model


def build_frame_predictor(
    options: PartOptions, clip: ClipShape, *, channels: int, num_target_frames: int, mean: float, std: float
) -> FramePredictor:
    """Build a model that predicts frames.

    Args:
        options: Value of an option of type `EncoderOptions`.
        clip: Size of the clips seen.
        channels: Color channels of the clips.
        num_target_frames: Number of frames to predict.
        mean: Mean of the values of the frames seen.
        std: Standard deviation of the values of the frames seen.

    Raises:
        ConfigError: The model predicts no frames, or sizes do not fit.
    """
    sizes = {"num_target_frames": num_target_frames, "in_chans": channels, "out_chans": channels}
    fields = type(options).model_fields
    for name in sizes.keys() & fields.keys():
        if getattr(options, name) != fields[name].default:
            raise ConfigError(f"encoder.{name}: already set by the section data; set it there")
    if "num_target_frames" not in fields:
        raise ConfigError(
            f"encoder.name: {options.name} predicts no frames; take encoder.name=generative_timesformer_small, or "
            "`pretrain`"
        )
    try:
        model = build_encoder(options.model_copy(update=sizes), clip)
    except ValueError as error:
        raise ConfigError(f"encoder, or the sizes in data: {error}") from None
    return FramePredictor(model, mean, std)
