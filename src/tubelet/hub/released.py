"""Files of V-JEPA, V-JEPA 2, V-JEPA 2-AC and V-JEPA 2.1, which do not say their architecture."""

import functools
import logging
import re
from collections.abc import Mapping
from typing import Any

from tubelet.config import ConfigError
from tubelet.hub.architecture import Fact, Facts, facts_of
from tubelet.hub.positions import recognize
from tubelet.hub.published import PRED_WIDTH, V1_MASK_TOKENS, V2_MASK_TOKENS, Published, named, of_size, usual_heads
from tubelet.hub.state import BY_WEIGHTS, IMAGENET, State, count, encoder_sizes, predictor_facts, without_prefixes
from tubelet.hub.weights import Weights

logger = logging.getLogger(__name__)

PARTS = ("encoder", "target_encoder", "ema_encoder", "predictor")
"""State dicts of a released file that are read."""
AVERAGES = ("target_encoder", "ema_encoder", "encoder")
"""Encoders in the order in which the key `target_encoder` is looked for: moving averages before the trained one."""

# What V-JEPA 2.1's embedding of a modality is added to.
_EMBEDS_VIDEO = re.compile(r"patch_embed\.proj\.bias|predictor_embed\.(?:2\.)?bias|mask_tokens\.\d+")
_EMBEDS_IMAGES = re.compile(r"patch_embed_img\.proj\.bias")


class ReleasedWeights(Weights):
    """A file of V-JEPA, V-JEPA 2 or of their code.

    Shapes, stored positions, the number of mask tokens and the name of the file tell what it holds. Where the name is
    that of a published model, its architecture is certain. Otherwise what neither shapes nor positions tell is assumed
    to be as in the published model of this size, and is asked for if there is none.
    """

    # Both depend on the parts only, which are read once.
    @functools.cached_property
    def encoder_sizes(self) -> tuple[dict[str, Any], dict[str, int]]:
        """Options of the encoder, and the sizes of its tokens, that its shapes tell."""
        return encoder_sizes(self.parts["target_encoder"], self.path)

    @functools.cached_property
    def published(self) -> Published | None:
        """The published model of this name and size, else the first one of this kind and size."""
        models, family = self._models, self.family
        if (model := named(models, self.path.name)) is not None and family in ("", model.family):
            return model
        return next((model for model in models if model.family == family), None)

    @property
    def _models(self) -> tuple[Published, ...]:
        """The published models of this size."""
        return of_size(self.encoder_sizes[0]["embed_dim"], self.encoder_sizes[0]["depth"])

    @property
    def is_named(self) -> bool:
        """Whether the file has the name, too, of a published model."""
        return self.published is not None and self.published.file == self.path.name

    @property
    def family(self) -> str:
        """The kind of pretraining, as far as the content tells."""
        models, predictor, mask_tokens = self._models, self.parts.get("predictor", {}), self._num_mask_tokens()
        has_positions = "pos_embed" in self.parts["target_encoder"]
        if mask_tokens == V2_MASK_TOKENS or "action_encoder.weight" in predictor:
            return "V-JEPA 2"
        if has_positions and (mask_tokens == V1_MASK_TOKENS or _published_by("V-JEPA", models)):
            return "V-JEPA"
        if _published_by("V-JEPA 2", models) and not _published_by("V-JEPA", models):
            return "V-JEPA 2"  # ViT-g
        return ""

    def facts(self) -> Facts:
        encoder, sizes = self.encoder_sizes
        facts = facts_of("encoder", encoder, BY_WEIGHTS) | facts_of("sizes", sizes, BY_WEIGHTS)
        facts |= facts_of("encoder", {"rope_pairing": "vjepa2"}, "in V-JEPA 2's code")
        if "tubelet_size" not in sizes:
            facts["sizes.num_frames"] = Fact(1, BY_WEIGHTS)  # an encoder of images
        return {**self._of_published(encoder), **facts, **self._of_positions(sizes)}

    def _of_published(self, encoder: Mapping[str, Any]) -> Facts:
        """Return what the published model of this size tells, or the usual number of heads."""
        model = self.published
        if model is None:
            name, heads = usual_heads(encoder["embed_dim"], encoder["depth"])
            return {} if heads is None else {"encoder.num_heads": Fact(heads, f"in a {name}", certain=False)}
        source = f"in the published {model}"
        sizes = {"img_size": model.img_size, "num_frames": model.num_frames}
        return {
            "encoder.num_heads": Fact(model.num_heads, source, self.is_named),
            **facts_of("sizes", sizes, source, certain=False),
        }

    def _of_positions(self, sizes: Mapping[str, int]) -> Facts:
        """Return the kind of positions, and the sizes of the clips that they are for."""
        state = self.parts["target_encoder"]
        facts: dict[str, Fact] = {}
        stored = recognize(state["pos_embed"], "tubelet_size" in sizes) if "pos_embed" in state else None
        family = self.family if self.published is None else self.published.family
        if family == "V-JEPA 2":
            # Some files keep sin-cos positions that are not used.
            facts |= facts_of("encoder", {"use_rope": True}, f"in {family}")
        elif stored is not None:
            certain = self.is_named or self._num_mask_tokens() == V1_MASK_TOKENS
            facts["encoder.use_rope"] = Fact(False, "by the sin-cos positions in it", certain)
            facts |= facts_of("encoder", {"uniform_power": stored.uniform_power}, "by the positions in it")
        if stored is not None:
            (t, h, w), patch = stored.grid, sizes["patch_size"]
            clip = {"img_size": h * patch if h == w else (h * patch, w * patch)}
            clip["num_frames"] = t * sizes.get("tubelet_size", 1)
            facts |= facts_of("sizes", clip, "by the positions in it")
        return facts

    def predictor_facts(self, state: State) -> Facts:
        facts = predictor_facts(state, self.path)
        model = self.published
        if model is not None and facts["predictor.embed_dim"].value == PRED_WIDTH:
            source = f"in the published {model}"
            facts["predictor.num_heads"] = Fact(model.pred_num_heads, source, self.is_named)
        same, encoder = ("use_rope", "rope_pairing", "rope_extent", "uniform_power"), self.facts()
        return facts | {f"predictor.{n}": encoder[f"encoder.{n}"] for n in same if f"encoder.{n}" in encoder}

    def normalization(self) -> dict[str, tuple[float, ...]]:
        return {} if self.published is None else dict(IMAGENET)

    def complete(self, wanted: Mapping[str, Any], predictor: bool) -> None:
        facts = self.facts()
        known = {key: fact.value for key, fact in facts.items()} | dict(wanted)
        required = {"encoder.num_heads": "num_heads=…, or model_name='vit_large', …"}
        required["encoder.use_rope"] = (
            "use_rope=True for rotary positions (V-JEPA 2), or use_rope=False for sin-cos ones, which it does not hold"
        )
        if known.get("encoder.use_rope") is False:
            required |= {"sizes.img_size": "img_size=…", "sizes.num_frames": "num_frames=…"}
            if known.get("sizes.num_frames") != 1:
                required["encoder.uniform_power"] = "uniform_power=True or False"
            self._check_recognized()
        missing = [remedy for key, remedy in required.items() if key not in known]
        if predictor and self._needs_predictor_heads(known):
            missing.append("pred_num_heads=…")
        if missing:
            raise ConfigError(
                f"{self.path}: no published model has this name or size, and the weights do not tell all of the "
                f"architecture; give, as in training, {'; '.join(missing)}"
            )
        positions = facts.get("encoder.use_rope")
        if positions is not None and not positions.certain and "encoder.use_rope" not in wanted:
            logger.warning("%s: assumed use_rope=False, %s; give use_rope=True if they are not used, as in V-JEPA 2",
                           self.path, positions.source)  # fmt: skip
        if self.published is None and "encoder.num_heads" not in wanted:
            heads = facts["encoder.num_heads"]
            logger.warning(
                "%s: assumed num_heads=%d, as %s; give it if it differs", self.path, heads.value, heads.source
            )
        size = facts.get("sizes.img_size")
        if predictor and size is not None and not size.certain and not self.is_named and "sizes.img_size" not in wanted:
            logger.warning(
                "%s: assumed img_size=%s and num_frames=%s, to which the predictor's indices of tokens refer, as %s; "
                "give them if they differ", self.path, size.value, known["sizes.num_frames"], size.source,
            )  # fmt: skip

    def _check_recognized(self) -> None:
        """Raise ConfigError where positions are stored that sin-cos ones would replace."""
        if "pos_embed" in self.parts["target_encoder"] and "encoder.use_rope" not in self.facts():
            raise ConfigError(
                f"{self.path}: the positions in it (pos_embed) are not V-JEPA's sin-cos ones, so its encoder is "
                "another one; if it has rotary positions and does not use them, set use_rope=True"
            )

    def _needs_predictor_heads(self, known: Mapping[str, Any]) -> bool:
        """Whether the number of heads of the predictor has to be given; V-JEPA's has as many as the encoder."""
        if known.get("predictor.num_heads") is not None:
            return False
        heads = self.predictor_facts(self.parts["predictor"]).get("predictor.num_heads")
        return heads is None and known.get("encoder.use_rope") is not False

    def _num_mask_tokens(self) -> int:
        return count(self.parts.get("predictor", {}), r"mask_tokens\.(\d+)")


class VJEPA21Weights(ReleasedWeights):
    """A file of V-JEPA 2.1."""

    # Levels by the depth of an encoder, where they are not spaced evenly.
    LEVELS = {48: (11, 23, 37, 47)}

    @property
    def family(self) -> str:
        return "V-JEPA 2.1"

    def facts(self) -> Facts:
        state, (encoder, sizes) = self.parts["target_encoder"], self.encoder_sizes
        depth, levels = encoder["depth"], 1 + count(state, r"level_norms\.(\d+)\.")
        rope = {"use_rope": True, "rope_pairing": "interleaved"}
        rope["rope_extent"] = 256 // sizes["patch_size"]  # of the 256 pixels of the first phase
        parts = {
            "levels": self.LEVELS.get(depth, levels) if levels == 4 else levels,
            "image_tokenizer": "patch_embed_img.proj.weight" in state,
        }
        return {
            **facts_of("sizes", {"img_size": 384, "num_frames": 64}, "in V-JEPA 2.1", certain=False),
            **self._of_published(encoder),
            **facts_of("encoder", encoder | parts, BY_WEIGHTS),
            **facts_of("encoder", rope, "in V-JEPA 2.1"),
            **facts_of("sizes", sizes, BY_WEIGHTS),
        }


def _published_by(family: str, models: tuple[Published, ...]) -> bool:
    return any(model.family == family for model in models)


def is_vjepa2_1(parts: Mapping[str, State]) -> bool:
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
