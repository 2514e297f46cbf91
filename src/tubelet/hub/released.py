"""Files that V-JEPA, V-JEPA 2 and V-JEPA 2.1 released."""

import math
import re
from typing import Any

from tubelet.config import ConfigError
from tubelet.grid import ClipShape
from tubelet.hub.weights import Architecture, State, Weights, as_sections, count

PARTS = ("encoder", "target_encoder", "ema_encoder", "predictor")
"""State dicts of a released file that are read."""
AVERAGES = ("target_encoder", "ema_encoder", "encoder")
"""Encoders in the order in which the key `target_encoder` is looked for: moving averages before the trained one."""

_PREFIXES = re.compile(r"(?:module\.|backbone\.)+")
# What V-JEPA 2.1's embedding of a modality is added to.
_EMBEDS_VIDEO = re.compile(r"patch_embed\.proj\.bias|predictor_embed\.(?:2\.)?bias|mask_tokens\.\d+")
_EMBEDS_IMAGES = re.compile(r"patch_embed_img\.proj\.bias")


class ReleasedWeights(Weights):
    """A file of V-JEPA or V-JEPA 2, which does not say the architecture."""

    def architecture(self) -> dict[str, Any]:
        options = {"uniform_power": False, "rope_pairing": "vjepa2"}
        return {"encoder": options, "predictor": options, "sizes": {}}

    def _options(
        self, arguments: dict[str, Any], predictor: dict[str, Any] | None = None
    ) -> tuple[Architecture, ClipShape]:
        if "name" not in as_sections(arguments)["encoder"]:
            raise ConfigError(f"{self.path}: it does not say which encoder it holds; give model_name='vit_large', …")
        return super()._options(arguments, predictor)


class VJEPA21Weights(Weights):
    """A file of V-JEPA 2.1, whose architecture is that of the released models, or follows from shapes."""

    # Attention heads by the width of the released encoders and of their predictor.
    ENCODER_HEADS = {768: 12, 1024: 16, 1408: 22, 1664: 26}
    PREDICTOR_HEADS = {384: 12}
    # Levels by the depth of an encoder, where they are not spaced evenly.
    LEVELS = {48: (11, 23, 37, 47)}

    def architecture(self) -> dict[str, Any]:
        state = self.parts["target_encoder"]
        embed_dim, in_chans, tubelet_size, patch_size, _ = state["patch_embed.proj.weight"].shape
        depth, levels = count(state, r"blocks\.(\d+)\."), 1 + count(state, r"level_norms\.(\d+)\.")
        rope = {"use_rope": True, "rope_extent": 256 // patch_size}  # of the 256 pixels of the first phase
        encoder: dict[str, Any] = {
            **rope,
            "embed_dim": embed_dim,
            "depth": depth,
            "in_chans": in_chans,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            "levels": self.LEVELS.get(depth, levels) if levels == 4 else levels,
            "image_tokenizer": "patch_embed_img.proj.weight" in state,
        }
        if "blocks.0.mlp.fc3.weight" in state:
            encoder["use_silu"] = True
        else:
            ratio = len(state["blocks.0.mlp.fc1.weight"]) / embed_dim
            encoder["mlp_ratio"] = (
                ratio if ratio.is_integer() else math.nextafter(ratio, math.inf)
            )  # it is rounded down
        sizes = {"img_size": 384, "num_frames": 64, "patch_size": patch_size, "tubelet_size": tubelet_size}
        return {"encoder": encoder, "predictor": rope, "sizes": sizes}

    def _options(
        self, arguments: dict[str, Any], predictor: dict[str, Any] | None = None
    ) -> tuple[Architecture, ClipShape]:
        given = as_sections(arguments)
        width = self.parts["target_encoder"]["patch_embed.proj.weight"].shape[0]
        heads = {"num_heads": self._heads("", width, self.ENCODER_HEADS, given["encoder"])}
        arguments = {**arguments, "encoder": {**given["encoder"], **heads}}
        if predictor is not None:
            heads = {
                "num_heads": self._heads("pred_", predictor["embed_dim"], self.PREDICTOR_HEADS, given["predictor"])
            }
            predictor = {**predictor, **heads}
        return super()._options(arguments, predictor)

    def _heads(self, prefix: str, width: int, released: dict[int, int], given: dict[str, Any]) -> int:
        """Return the number of attention heads, which no shape tells."""
        heads = given.get("num_heads", released.get(width))
        if heads is None:
            raise ConfigError(
                f"{self.path}: width {width} is none of the released ones ({', '.join(map(str, released))}), and the "
                f"weights do not tell the number of attention heads; give {prefix}num_heads=…"
            )
        return heads


def is_vjepa2_1(parts: Any) -> bool:
    """Whether the state dicts of a released file, with Tubelet's names, are those of V-JEPA 2.1."""
    return "target_encoder" in parts and "level_norms.0.weight" in parts["target_encoder"]


def to_tubelet(state: State) -> State:
    """Return a state dict with Tubelet's names; those of a state dict of Tubelet do not change.

    V-JEPA 2.1's encoder has a normalization layer for each level. Its embeddings of the modalities, constants that are
    added to all tokens of a video or of an image, become part of biases and mask tokens; the predictor's embedding of
    images is left out.
    """
    state = without_prefixes(state)
    last = count(state, r"norms_block\.(\d+)\.") - 1
    state = {
        name.replace(f"norms_block.{last}.", "norm.").replace("norms_block.", "level_norms."): tensor
        for name, tensor in state.items()
    }
    for modality, embeds in (("video_mod_embed", _EMBEDS_VIDEO), ("img_mod_embed", _EMBEDS_IMAGES)):
        if modality in state:
            constant = state.pop(modality)
            state |= {n: x + constant.view(x.shape) for n, x in state.items() if embeds.fullmatch(n)}
    return state


def without_prefixes(state: State) -> State:
    """Strip `module.` (DistributedDataParallel), `backbone.` (mask wrapper) and `_orig_mod.` (torch.compile)."""
    names = {name: name.replace("_orig_mod.", "") for name in state}
    return {
        (name[match.end() :] if (match := _PREFIXES.match(name)) else name): state[stored]
        for stored, name in names.items()
    }
