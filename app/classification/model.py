"""An encoder with a head for classes, and where its weights come from."""

import torch
from einops import rearrange
from torch import Tensor, nn

from app.classification.options import ImageViTConfig, Options
from tubelet.config import ConfigError
from tubelet.models import ModelConfig, build_encoder
from tubelet.models.inflatable import InflatableEncoder
from tubelet.models.pretrained import FramewiseViT
from tubelet.probing import heads
from tubelet.probing.encoder import load


class Classifier(nn.Module):
    """An encoder and its head: clips [B, n, C, T, H, W] -> logits [B, P, num_classes] of P predictions a video."""

    def __init__(self, options: Options):
        super().__init__()
        self.segments = options.data.num_segments
        self.attend_across_segments = options.optimization.attend_across_segments
        self.encoder = build(options)
        if options.head == "linear":
            width = self.encoder.embed_dim
            head = heads.LinearHead(torch.zeros(width), torch.ones(width), options.data.num_classes)
        else:
            head = heads.attentive(options.classifier, self.encoder, options.data.num_classes)
        self.head = heads.Heads([head])

    def forward(self, clips: Tensor) -> Tensor:
        tokens = self.encoder(clips.flatten(0, 1))
        tokens = rearrange(tokens, "(B s v) N D -> B s v N D", B=len(clips), s=self.segments)
        return heads.read_out(self.head, tokens, self.attend_across_segments)[0]


def build(options: Options) -> nn.Module:
    """The encoder with its first weights; ConfigError where they do not fit it, or it does not fit the clips."""
    data, side = options.data, options.optimization.resolution
    if options.pretrain is not None:
        return load(options.pretrain, data.frames_per_clip, side)
    sizes = {"patch_size": data.patch_size or 16, "tubelet_size": data.tubelet_size or 2}
    try:
        encoder = build_encoder(
            options.model or ModelConfig(), crop_size=side, num_frames=data.frames_per_clip, **sizes
        )
    except ValueError as error:
        raise ConfigError(f"model, optimization.resolution or data.frames_per_clip: {error}") from None
    if options.image_vit is not None:
        inflate(encoder, options.image_vit, side)
    return encoder


def inflate(encoder: nn.Module, image_vit: ImageViTConfig, resolution: int) -> None:
    """Let the encoder start as an image ViT of timm; ConfigError where it cannot."""
    if not isinstance(encoder, InflatableEncoder):
        raise ConfigError(
            f"image_vit: {type(encoder).__name__} cannot start as an image ViT; take model.encoder=timesformer or "
            "vivit, or give timm's weights to model.encoder=pretrained model.encoder_args.weights=…"
        )
    try:
        image = FramewiseViT(
            image_vit.timm_name, resolution, 1, encoder.patch_size, tubelet_size=1, weights=image_vit.weights
        )
        encoder.init_from_image_vit(image.model, image_vit.tubelet_init)
    except ValueError as error:
        raise ConfigError(f"image_vit: {error}") from None
