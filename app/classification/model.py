"""The classifier of supervised training: a head on an encoder that is new, pretrained or an inflated image ViT."""

import torch
from torch import nn

from app.classification.options import ImageViTConfig, Options
from tubelet.config import ConfigError
from tubelet.models.inflatable import InflatableEncoder
from tubelet.models.pretrained import FramewiseViT
from tubelet.objectives.supervised import PairMixing, Supervised
from tubelet.probing import heads
from tubelet.probing.fine_tuning import initial_encoder
from tubelet.runtime.seeds import seed_for


def build_classifier(options: Options) -> Supervised:
    """Build encoder and head with their initial weights, a function of the seed.

    Raises:
        ConfigError: The weights do not fit the encoder, or the encoder does not fit the clips.
    """
    data, o, seed = options.data, options.optimization, options.meta.seed
    mixing = PairMixing(o.mixup, o.cutmix, data.num_classes, seed) if o.mixes else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "supervised"))
        encoder = initial_encoder(options)
        if options.image_vit is not None:
            inflate(encoder, options.image_vit, o.resolution)
        num_slots = encoder.grid_size(data.frames_per_clip, o.resolution, o.resolution).t
        if o.attend_across_segments:
            num_slots *= data.num_segments
        head = heads.build_head(options.head, encoder, data.num_classes, num_slots=num_slots)
    assert data.normalize_mean is not None  # see `with_normalization`
    assert data.normalize_std is not None
    return Supervised(
        encoder,
        head,
        mean=data.normalize_mean,
        std=data.normalize_std,
        segments=data.num_segments,
        attend_across_segments=o.attend_across_segments,
        label_smoothing=o.label_smoothing,
        layer_decay=o.layer_decay,
        mixing=mixing,
    )


def inflate(encoder: nn.Module, image_vit: ImageViTConfig, resolution: int) -> None:
    """Initialize the encoder from an image ViT of timm. Raises ConfigError where it cannot be."""
    if not isinstance(encoder, InflatableEncoder):
        raise ConfigError(
            f"image_vit: {type(encoder).__name__} cannot start from an image ViT; take timesformer_base or vivit_base, "
            "or an encoder of tubelet/models/pretrained.py, which reads timm's weights with encoder.weights=…"
        )
    try:
        image = FramewiseViT(
            image_vit.timm_name, resolution, 1, encoder.patch_size, tubelet_size=1, weights=image_vit.weights
        )
        encoder.init_from_image_vit(image.model, image_vit.tubelet_init)
    except ValueError as error:
        raise ConfigError(f"image_vit: {error}") from None
