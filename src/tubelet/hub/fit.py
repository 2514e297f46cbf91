"""Whether weights of a file fit the modules of a new run, and what of them the modules take."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tubelet.config import ConfigError
from tubelet.hub import architecture, sound
from tubelet.hub.architecture import Fact, Facts, facts_of
from tubelet.hub.state import BY_WEIGHTS, State, check_numbers, count, without_unused
from tubelet.hub.weights import Weights, levels_read, out_dim

logger = logging.getLogger(__name__)


def check(weights: Weights, modules: Mapping[str, nn.Module], normalization: Mapping[str, Sequence[float]]) -> None:
    """Compare what is known of the weights with the modules that are to load them, and the clips of these.

    Args:
        weights: The weights.
        modules: Modules by the names of parts. Those with an attribute `built_from` are compared, see `build_encoder`
            and `build_predictor`.
        normalization: `normalize_mean` and `normalize_std` of the modules' clips.

    Raises:
        ConfigError: With the architecture of a module, the weights mean something else.
    """
    for name, module in modules.items():
        built_from = getattr(module, "built_from", {})
        if name not in weights.parts or not built_from:
            continue
        if "sound_encoder" in built_from:
            sound.check(weights.path, built_from)
            continue
        facts: Facts = weights.facts()
        clip = built_from["clip"]
        sizes = {"img_size": clip["crop_size"], **{key: value for key, value in clip.items() if key != "crop_size"}}
        section = "predictor" if "predictor" in built_from else "encoder"
        wanted = architecture.keys({section: built_from[section], "sizes": sizes})
        if section == "predictor":
            state = weights.part(name)
            facts = {**facts, **weights.predictor_facts(state), **_outputs(state, weights)}
            wanted |= {
                "objective.levels": getattr(module, "levels", 1),
                "objective.predict_context": getattr(module, "predict_context", False),
                "objective.predicted_width": getattr(getattr(module, "predictor_proj", None), "out_features", None),
            }
        # A run may go on with longer or larger clips, whose positions are computed anew.
        architecture.check(weights.path, facts, wanted, _remedy, adaptable=("sizes.img_size", "sizes.num_frames"))
        _warn_of_unknown(weights.path, section, facts, wanted)
    check_normalization(weights, normalization)


def check_normalization(
    weights: Weights, normalization: Mapping[str, Sequence[float]], section: str = "data_aug"
) -> None:
    """Warn where clips are normalized otherwise than in the training of the weights, where that is known."""
    facts = facts_of(section, weights.normalization(), "in the training of the weights")
    wanted = {f"{section}.{name}": value for name, value in normalization.items()}
    architecture.check(weights.path, facts, wanted, _remedy)


def adapt(state: State, module: nn.Module, path: str | Path) -> State:
    """Drop the weights that a module is built without: levels, the image tokenizer, and further mask tokens.

    Raises:
        ConfigError: The module has more mask tokens than the file.
        CheckpointError: Weights are not finite, or quantized.
    """
    state = without_unused(state, module)
    check_numbers(state, str(path))
    tokens = getattr(module, "mask_tokens", None)
    stored, needed = count(state, r"mask_tokens\.(\d+)"), 0 if tokens is None else len(tokens)
    if stored < needed and stored > 0:
        raise ConfigError(
            f"{path}: its predictor has {stored} mask token(s), one for each mask of its training, this run's has "
            f"{needed}; set `mask` to a list of {stored}"
        )
    if stored > needed > 0:
        logger.warning("%s: of the %d mask tokens of its predictor, the first %d are used", path, stored, needed)
        state = {
            name: tensor
            for name, tensor in state.items()
            if not name.startswith("mask_tokens.") or int(name.split(".")[1]) < needed
        }
    return state


def _warn_of_unknown(path: Path, section: str, facts: Facts, wanted: Mapping[str, Any]) -> None:
    """Log what neither shapes nor a published model tell of a file, and is therefore taken from the run."""
    names = (
        ["num_heads", "use_rope"] if wanted.get(f"{section}.use_rope") else ["num_heads", "use_rope", "uniform_power"]
    )
    keys = [f"{section}.{name}" for name in names]
    unknown = [f"{key}={architecture.text(wanted[key])}" for key in keys if key in wanted and key not in facts]
    if unknown:
        logger.warning("%s does not say with which options it was trained; assumed %s", path, ", ".join(unknown))


def _outputs(predictor: State, weights: Weights) -> Facts:
    """Return what a predictor reads and predicts, by its weights."""
    facts = {}
    width = weights.facts().get("encoder.embed_dim")
    if width is not None:
        facts["objective.levels"] = Fact(levels_read(predictor, width.value), BY_WEIGHTS)
    if (predicted := out_dim(predictor)) is not None:
        facts["objective.predicted_width"] = Fact(predicted, BY_WEIGHTS)
        facts["objective.predict_context"] = Fact("predictor_proj_context.weight" in predictor, BY_WEIGHTS)
    return facts


def _remedy(key: str, value: Any) -> str:
    """Return the option of a run that is to be changed."""
    section, _, name = key.rpartition(".")
    if section == "objective":
        return {
            "levels": f"take objective.name=vjepa2_1 with objective.levels={value}",
            "predict_context": "take an objective that predicts visible tokens, too, or not, as its training did",
            "predicted_width": f"take a teacher whose features have {value} channels, as in its training",
        }[name]
    options = {"sizes.img_size": "data.crop_size", "sizes": "data", "predictor": "objective.predictor"}
    option = options.get(key, f"{options.get(section, section)}.{name}")
    return f"set {option}={architecture.text(value)}"
