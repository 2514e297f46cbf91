"""Encoders, the predictor and the probe's pooler. A file of this folder is an encoder file if it holds factories."""

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

import pydantic
import torch
from torch import nn

from tubelet.config import Config, Pair, nearest
from tubelet.config import registry as plugins
from tubelet.layers.positions import RopePairing
from tubelet.models.predictor import NoiseSchedule, VisionTransformerPredictor

# Options of the section that are passed on to every encoder that has them.
_SHARED_OPTIONS = (
    "uniform_power",
    "use_rope",
    "rope_pairing",
    "use_silu",
    "wide_silu",
    "init_std",
    "use_activation_checkpointing",
)


class ModelConfig(Config):
    """YAML section `model`: which encoder, and the predictor's size.

    `encoder` names a file of tubelet/models, `model_name` a factory in it, `encoder_args` its further arguments.
    `pred_num_heads` is the encoder's number of heads if None, `noise_beta` the usual range of its schedule.
    """

    encoder: str = "vision_transformer"
    model_name: str = "vit_base"
    encoder_args: dict[str, Any] = {}
    uniform_power: bool = True
    use_rope: bool = False
    rope_pairing: RopePairing = "interleaved"
    use_silu: bool = False
    wide_silu: bool = True
    init_std: float = pydantic.Field(0.02, gt=0)
    use_activation_checkpointing: bool = False
    pred_depth: int = pydantic.Field(12, ge=1)
    pred_embed_dim: int = pydantic.Field(384, ge=1)
    pred_num_heads: int | None = None
    use_mask_tokens: bool = True
    zero_init_mask_tokens: bool = True
    noise_schedule: NoiseSchedule = "cosine"
    noise_beta: Pair | None = None
    noise_steps: int = pydantic.Field(1000, ge=1)

    @pydantic.field_validator("encoder")
    @classmethod
    def _file_exists(cls, encoder: str) -> str:
        file = plugins.snake_case(encoder)
        if file not in plugins.available("models") or not factories(encoder):
            files = [name for name in plugins.available("models") if factories(name)]
            raise ValueError(f"'{encoder}': no encoder of that name in tubelet/models. {nearest(file, files)}")
        return encoder

    @pydantic.model_validator(mode="after")
    def _can_be_built(self) -> "ModelConfig":
        """Building on the meta device takes no memory, and runs the parts' own checks before any data is read."""
        sizes = {"crop_size": 32, "num_frames": 4, "patch_size": 16, "tubelet_size": 2}
        with torch.device("meta"):
            build_encoder(self, **sizes)
        return self


def check_returns_tokens(encoder_args: dict[str, Any], key: str) -> None:
    """Raises ValueError where an encoder is asked for other things than its last tokens, which programs work with."""
    for name, what in (("num_classes", "logits of its own"), ("out_layers", "the tokens of several layers")):
        if encoder_args.get(name):
            raise ValueError(f"{key}.{name}: the encoder gives its last tokens here, not {what}; remove it")


def build_encoder(
    model: ModelConfig, *, crop_size: int | tuple[int, int], num_frames: int, patch_size: int, tubelet_size: int
) -> nn.Module:
    """The encoder of the YAML section for clips of these sizes; ValueError where they do not go together.

    Its attribute `built_from` says the sections `model` and `data` that it was built from, to be kept in checkpoints.
    """
    known = factories(model.encoder)
    if model.model_name not in known:
        raise ValueError(
            f"model_name '{model.model_name}': not in models/{model.encoder}.py. {nearest(model.model_name, known)}"
        )
    factory = known[model.model_name]
    accepted = inspect.signature(factory).parameters
    sizes = {
        "img_size": crop_size,
        "num_frames": num_frames,
        "patch_size": patch_size,
        "tubelet_size": tubelet_size,
    }
    options = {name: getattr(model, name) for name in _SHARED_OPTIONS}
    for name in model.encoder_args:
        if name in sizes or name in options:
            section = "data" if name in sizes else "model"
            raise ValueError(f"encoder_args.{name}: already set by the section {section}; set it there")
        if name not in accepted:
            raise ValueError(f"encoder_args.{name}: {model.model_name} has no such argument. {nearest(name, accepted)}")
    for name, value in options.items():
        if name not in accepted and value != ModelConfig.model_fields[name].default:
            raise ValueError(f"{name}: {model.model_name} of models/{model.encoder}.py has no such option; remove it")
    given = {name: value for name, value in {**sizes, **options}.items() if name in accepted}
    try:
        encoder = factory(**given, **model.encoder_args)
    except TypeError as error:
        raise ValueError(f"encoder_args {model.encoder_args}: {error}") from error
    encoder.built_from = {
        "model": model.model_dump(mode="json"),
        "data": {"crop_size": crop_size, **{name: sizes[name] for name in sizes if name != "img_size"}},
    }
    return encoder


def build_predictor(
    model: ModelConfig,
    encoder: nn.Module,
    *,
    crop_size: int | tuple[int, int],
    num_frames: int,
    patch_size: int,
    tubelet_size: int,
    num_mask_tokens: int,
) -> nn.Module:
    """The predictor that goes with `encoder`; one mask token for each mask of the configuration."""
    return VisionTransformerPredictor(
        img_size=crop_size,
        patch_size=patch_size,
        num_frames=num_frames,
        tubelet_size=tubelet_size,
        embed_dim=encoder.embed_dim,
        predictor_embed_dim=model.pred_embed_dim,
        depth=model.pred_depth,
        num_heads=model.pred_num_heads or encoder.num_heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        init_std=model.init_std,
        uniform_power=model.uniform_power,
        use_mask_tokens=model.use_mask_tokens,
        num_mask_tokens=num_mask_tokens,
        zero_init_mask_tokens=model.zero_init_mask_tokens,
        use_rope=model.use_rope,
        rope_pairing=model.rope_pairing,
        use_silu=model.use_silu,
        wide_silu=model.wide_silu,
        use_activation_checkpointing=model.use_activation_checkpointing,
        noise_schedule=model.noise_schedule,
        noise_beta=model.noise_beta,
        noise_steps=model.noise_steps,
    )


def factories(encoder: str) -> dict[str, Callable[..., nn.Module]]:
    """Factories in tubelet/models/<encoder>.py: its public partials, and functions annotated to return a module.

    ConfigError for an unknown file.
    """
    module = plugins.find("models", encoder)
    return {
        name: value for name, value in vars(module).items() if not name.startswith("_") and _is_factory(value, module)
    }


def _is_factory(value: object, module: ModuleType) -> bool:
    if isinstance(value, partial):
        return True
    if not isinstance(value, FunctionType) or value.__module__ != module.__name__:
        return False
    returned = inspect.signature(value).return_annotation
    return isinstance(returned, type) and issubclass(returned, nn.Module)
