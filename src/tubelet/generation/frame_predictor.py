"""A model that is trained to predict frames, such as the generative TimeSformer, on frames from 0 to 1."""

from torch import Tensor, nn

from tubelet.config import ConfigError
from tubelet.models import ModelConfig, build_encoder


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
    config: ModelConfig,
    *,
    channels: int,
    crop_size: int,
    num_frames: int,
    num_target_frames: int,
    patch_size: int,
    tubelet_size: int,
    mean: float,
    std: float,
) -> FramePredictor:
    """The model of the YAML section `model` with the sizes of the data; ConfigError where it predicts no frames."""
    sizes = {"num_target_frames": num_target_frames, "in_chans": channels, "out_chans": channels}
    for name in sizes.keys() & config.encoder_args.keys():
        raise ConfigError(f"model.encoder_args.{name}: already set by the section data; set it there")
    config = config.model_copy(update={"encoder_args": config.encoder_args | sizes})
    try:
        model = build_encoder(
            config, crop_size=crop_size, num_frames=num_frames, patch_size=patch_size, tubelet_size=tubelet_size
        )
    except ValueError as error:
        hint = ""
        if "num_target_frames: " in str(error):
            hint = f"\n  {config.encoder} predicts no frames; take model.encoder=generative_timesformer, or `pretrain`"
        raise ConfigError(f"model, or the sizes in data: {error}{hint}") from None
    return FramePredictor(model, mean, std)
