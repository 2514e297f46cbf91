"""State dicts: reading them part by part, names, and sizes that their shapes tell."""

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tubelet.data import NORMALIZATION, AugConfig
from tubelet.hub.architecture import Fact, facts_of
from tubelet.runtime import checkpoint

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

IMAGENET: dict[str, tuple[float, ...]] = {name: AugConfig.model_fields[name].default for name in NORMALIZATION}
"""Normalization of clips in the trainings of all published models."""
BY_WEIGHTS = "by its weights"
# Wrappers of torch that add to names: anywhere, as parts may be wrapped, or at the start.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIXES = re.compile(r"(?:module\.|backbone\.)+")
_FIXED_POSITIONS = ("pos_embed", "predictor_pos_embed")
_OPTIONAL = ("level_norms.", "patch_embed_img.")


class Parts(Mapping[str, State]):
    """State dicts of a checkpoint, each read and verified on first access.

    Args:
        path: The checkpoint.
        names: Those of its state dicts that are parts, as opposed to optimizers and such.
        encoders: Names of encoders. The first of them that is there also has the name `target_encoder`, if no part has.
        convert: Renames what was read.
    """

    def __init__(self, path: Path, names: Sequence[str], encoders: Sequence[str], convert: Callable[[State], State]):
        self._path, self._convert = path, convert
        self._stored_as: dict[str, str] = {name: name for name in names}
        if "target_encoder" not in names and (found := [name for name in encoders if name in names]):
            self._stored_as["target_encoder"] = found[0]
            logger.info("%s has no target_encoder; its %s is taken for it", path, found[0])
        self._read: dict[str, State] = {}

    def __getitem__(self, name: str) -> State:
        stored_as = self._stored_as[name]
        if stored_as not in self._read:
            if not self._read:
                checkpoint.check_intact(self._path, "weights")
            self._read[stored_as] = self._convert(checkpoint.read_weights(self._path, [stored_as])[stored_as])
        return self._read[stored_as]

    def __contains__(self, name: object) -> bool:
        return name in self._stored_as  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_as)

    def __len__(self) -> int:
        return len(self._stored_as)


def without_prefixes(state: State) -> State:
    """Strip what DistributedDataParallel, FSDP, torch.compile and V-JEPA's mask wrapper add to names, in any order."""
    result = {}
    for stored, tensor in state.items():
        name = _WRAPPERS.sub("", stored)
        while match := _PREFIXES.match(name):
            name = _WRAPPERS.sub("", name[match.end() :])
        if name in result:
            raise checkpoint.CheckpointError(
                f"two weights have the name {name} after the prefixes of wrappers are removed; write one state dict of "
                "the module without wrappers"
            )
        result[name] = tensor
    return result


def without_fixed_positions(state: State) -> State:
    """Drop sin-cos position embeddings, which are computed from the sizes of the clips."""
    return {name: tensor for name, tensor in state.items() if name not in _FIXED_POSITIONS}


def without_unused(state: State, module: nn.Module) -> State:
    """Drop the weights of levels and of the image tokenizer where the module is built without them."""
    expected = tuple(module.state_dict())
    unused = tuple(part for part in _OPTIONAL if not any(name.startswith(part) for name in expected))
    return {name: tensor for name, tensor in state.items() if not name.startswith(unused)}


def check_numbers(state: State, what: str) -> None:
    """Raise CheckpointError where weights are not finite, or quantized, which are no weights without their scales.

    Args:
        state: The weights.
        what: What they are, for the message.
    """
    for name, tensor in state.items():
        if tensor.ndim > 0 and not tensor.is_floating_point():
            raise checkpoint.CheckpointError(
                f"{what}: {name} is of type {str(tensor.dtype).removeprefix('torch.')}, not of floating point; write "
                "the weights as float32, without quantization"
            )
        if not tensor.isfinite().all():
            raise checkpoint.CheckpointError(
                f"{what}: {name} has numbers that are not finite, as after a training that diverged; take an earlier "
                "checkpoint"
            )


def count(state: State, pattern: str) -> int:
    """Count the distinct values of the pattern's group among the names in the state dict."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def encoder_sizes(state: State, path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the options of a vision transformer, and the sizes of its tokens, that follow from shapes.

    Raises:
        CheckpointError: These are not the weights of a vision transformer.
    """
    kernel, hidden = state.get("patch_embed.proj.weight"), state.get("blocks.0.mlp.fc1.weight")
    if kernel is None or kernel.ndim not in (4, 5) or hidden is None or hidden.ndim != 2:
        raise checkpoint.CheckpointError(
            f"{path}: not the weights of a vision transformer like V-JEPA's, which have patch_embed.proj.weight and "
            f"blocks.0.mlp.fc1.weight; here are {_some(state)}. Write the state dict of the encoder alone under the "
            "key 'encoder', or load it with the library it comes from"
        )
    width, channels, *tubelet, patch, _ = kernel.shape
    options: dict[str, Any] = {
        "embed_dim": width,
        "depth": count(state, r"blocks\.(\d+)\."),
        "in_chans": channels,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        **_feed_forward(state, "blocks.0.mlp.", width),
    }
    return options, {"patch_size": patch, "tubelet_size": tubelet[0]} if tubelet else {"patch_size": patch}


def predictor_facts(state: State, path: Path) -> dict[str, Fact]:
    """Return the options of V-JEPA's predictor that its weights tell.

    Raises:
        CheckpointError: These are not the weights of such a predictor.
    """
    if "action_encoder.weight" in state:
        raise checkpoint.CheckpointError(
            f"{path}: the predictor is the action-conditioned one of V-JEPA 2-AC, which Tubelet does not have. Its "
            "encoder can be read: hub.load_encoder. A predictor of masked tokens is in vitg.pt, from which it was made"
        )
    norm, hidden = state.get("predictor_norm.weight"), state.get("predictor_blocks.0.mlp.fc1.weight")
    if norm is None or norm.ndim != 1 or hidden is None or hidden.ndim != 2 or "predictor_proj.weight" not in state:
        raise checkpoint.CheckpointError(
            f"{path}: not the weights of V-JEPA's predictor, which have predictor_norm.weight, predictor_proj.weight "
            f"and predictor_blocks.0.mlp.fc1.weight; here are {_some(state)}. The encoder may still be read with "
            "hub.load_encoder"
        )
    width = len(norm)
    options = {
        "embed_dim": width,
        "depth": count(state, r"predictor_blocks\.(\d+)\."),
        "use_mask_tokens": "mask_tokens.0" in state,
        "qkv_bias": "predictor_blocks.0.attn.qkv.bias" in state,
        **_feed_forward(state, "predictor_blocks.0.mlp.", width),
    }
    return facts_of("predictor", options, BY_WEIGHTS)


def _feed_forward(state: State, prefix: str, width: int) -> dict[str, Any]:
    hidden = len(state[f"{prefix}fc1.weight"])
    if f"{prefix}fc3.weight" in state:
        return {"use_silu": True, "wide_silu": hidden < 4 * width}
    ratio = hidden / width
    return {"mlp_ratio": ratio if ratio.is_integer() else math.nextafter(ratio, math.inf)}  # it is rounded down


def _some(state: State) -> str:
    return f"{', '.join(list(state)[:4]) or 'none'}{', …' if len(state) > 4 else ''}"
