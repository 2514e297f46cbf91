"""Encoders, predictors and the pooler of probes.

An encoder is a class with the attribute `accepts_masks` and a factory of some size, such as
`my_tiny = functools.partial(MyEncoder, embed_dim=192)`. In a file of this folder a configuration finds it by its name,
elsewhere by its dotted name: `encoder: {name: my_package.my_encoder.my_tiny}`. Its options are the annotated arguments
of the constructor.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from tubelet.config import Config, ConfigError
from tubelet.config.aliases import SHARED
from tubelet.config.factories import Factory
from tubelet.config.registry import PartOptions
from tubelet.grid import ClipShape
from tubelet.models.interfaces import Encoder, Predictor

ENCODERS = Factory("encoders", "tubelet.models", marker="accepts_masks", default="vit_base")
PREDICTORS = Factory(
    "predictors",
    "tubelet.models",
    marker="use_mask_tokens",
    default="vision_transformer_predictor",
    # given by the encoder, the masks and the objective
    skip=("embed_dim", "num_mask_tokens", "out_dim", "levels", "predict_context"),
    rename={"predictor_embed_dim": "embed_dim"},
    inherit=("num_heads",),
)

EncoderOptions = Annotated[PartOptions, ENCODERS]
"""Type of an option that selects an encoder: its name, or `{name: vit_large, **arguments of the constructor}`."""
PredictorOptions = Annotated[PartOptions, PREDICTORS]
"""Type of an option that selects a predictor. `num_heads: null` takes the number of the encoder."""


def build_encoder(options: Config | dict[str, Any] | str, clip: ClipShape) -> Encoder:
    """Build an encoder for clips of a size.

    Args:
        options: Value of an option of type `EncoderOptions`, as checked or as in YAML.
        clip: Size of the clips and tubelets.

    Returns:
        The encoder. Its attribute `built_from` holds `options` and `clip` as JSON types, for checkpoints.

    Raises:
        ValueError: Options and sizes do not fit together.

    Example:
        >>> encoder = build_encoder({"name": "vit_tiny", "use_rope": True}, ClipShape(16, 224))
    """
    options = ENCODERS.parse(options)
    encoder = options.build(**_sizes(clip))
    encoder.built_from = {"encoder": options.model_dump(mode="json"), "clip": clip.as_dict()}
    return encoder


def build_predictor(
    options: Config | dict[str, Any] | str,
    encoder: Encoder,
    clip: ClipShape,
    num_mask_tokens: int,
    out_dim: int | None = None,
    levels: int = 1,
    predict_context: bool = False,
) -> Predictor:
    """Build the predictor for the features of `encoder`.

    Args:
        options: Value of an option of type `PredictorOptions`, as checked or as in YAML.
        encoder: Encoder with the attributes `embed_dim` and `num_heads`.
        clip: Size of the clips and tubelets.
        num_mask_tokens: Number of learned mask tokens, one for each mask.
        out_dim: Values that are predicted for each token; None for as many as the features of all levels have.
        levels: Number of levels of the encoder whose features the predictor gets.
        predict_context: Predict the features of the visible tokens, too.

    Returns:
        The predictor. Its attribute `built_from` is as that of an encoder.

    Raises:
        ValueError: Options and sizes do not fit together, or the predictor lacks `levels` or `predict_context`.
    """
    given = {"embed_dim": encoder.embed_dim, "num_heads": encoder.num_heads, "num_mask_tokens": num_mask_tokens}
    if out_dim is not None:
        given["out_dim"] = out_dim
    options = PREDICTORS.parse(options)
    predictor = options.build(**_sizes(clip), **given, levels=levels, predict_context=predict_context)
    if getattr(predictor, "levels", 1) != levels or getattr(predictor, "predict_context", False) != predict_context:
        raise ValueError(
            f"name: {options.name} cannot take {levels} level(s) of features, or cannot predict those of the visible "
            "tokens; take vision_transformer_predictor"
        )
    heads = {"num_heads": encoder.num_heads} if getattr(options, "num_heads", ...) is None else {}
    predictor.built_from = {"predictor": options.model_dump(mode="json") | heads, "clip": clip.as_dict()}
    return predictor


def drop_lacking_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an encoder without those of V-JEPA that it lacks and that are set to their defaults.

    So one file of options for V-JEPA's encoders serves for the others, too.
    """
    try:
        fields = ENCODERS.locate(ENCODERS.with_name(raw))[0].model_fields
    except (ConfigError, ValueError):  # which checking the options reports
        return dict(raw)
    return {key: value for key, value in raw.items() if key in fields or key not in SHARED or value != SHARED[key]}


def check_returns_tokens(options: Config | Mapping[str, Any], key: str) -> None:
    """Raise ValueError, naming `key`, where an encoder would not return the tokens of its last layer."""
    given = options.model_dump() if isinstance(options, Config) else options
    for name, output in (("num_classes", "logits"), ("out_layers", "the tokens of several layers")):
        if given.get(name):
            raise ValueError(f"{key}.{name}: the last tokens of the encoder are needed here, not {output}; remove it")


def _sizes(clip: ClipShape) -> dict[str, Any]:
    return {
        "img_size": clip.crop_size,
        "num_frames": clip.num_frames,
        "patch_size": clip.patch_size,
        "tubelet_size": clip.tubelet_size,
    }
