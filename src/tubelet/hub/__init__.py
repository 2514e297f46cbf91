"""Load weights: Tubelet's runs, V-JEPA `.pth.tar`, V-JEPA 2 `.pt`, folders of transformers' VJEPA2Model.

No code from a file is executed. Missing or unexpected keys are an error that lists them.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tubelet.config import Config, ConfigError, check, merge, nearest
from tubelet.config.aliases import Translation, to_canonical
from tubelet.data import NORMALIZATION
from tubelet.grid import ClipShape
from tubelet.layers import MLP
from tubelet.models import EncoderOptions, PredictorOptions, build_encoder, build_predictor, drop_lacking_defaults
from tubelet.models.attentive_pooler import AttentiveClassifier
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.runtime import checkpoint, checkpoint_v1
from tubelet.runtime.files import save_tensors

State = dict[str, Tensor]


def load_encoder(path: str | Path, checkpoint_key: str = "target_encoder", **arguments: Any) -> Encoder:
    """Load the encoder of a run folder, a checkpoint, a released file or a folder of transformers.

    Args:
        path: File or folder.
        checkpoint_key: Which encoder of the file: `target_encoder`, `encoder`, or another that the run's objective
            offers (`Objective.encoders`). `target_encoder` is the first of these where no part has that name.
        arguments: What the file does not say, or what should differ: options of the encoder such as `out_layers`, by
            themselves or together in `encoder={"name": …, …}`; V-JEPA's names `model_name`, `uniform_power`,
            `use_rope`, …; and `img_size`, `num_frames`, `patch_size`, `tubelet_size`. V-JEPA and V-JEPA 2 files need
            `model_name`, `img_size` and `num_frames` as in their training; V-JEPA's take `uniform_power=True`,
            V-JEPA 2's `use_rope=True`. The encoder takes clips of other sizes too; positions are then interpolated.

    Raises ConfigError for unknown or missing arguments, CheckpointError where the weights do not fit the encoder.

    >>> encoder = load_encoder("vitl16.pth.tar", model_name="vit_large", num_frames=16, uniform_power=True)
    """
    return read(path).load_encoder(checkpoint_key, **arguments)


def load_predictor(path: str | Path, checkpoint_key: str = "predictor", **arguments: Any) -> Predictor:
    """Load the predictor of a pretraining; path, arguments and errors as for `load_encoder`.

    Its depth, width and number of mask tokens are read from the weights. The number of heads, `pred_num_heads` or
    `predictor={"num_heads": …}`, is the encoder's by default, as in V-JEPA; V-JEPA 2's released predictors have 12.
    """
    return read(path).load_predictor(checkpoint_key, **arguments)


def load_probe(
    path: str | Path, num_heads: int | None = None, index: int | None = None, use_proj: bool | None = None
) -> nn.Module:
    """Load the head of a trained or released probe: tokens [B, N, D] -> logits [B, num_classes].

    Args:
        path: Folder of a probe of Tubelet, its `probe.safetensors` (`probe.pt` in 0.1), a file of V-JEPA
            (`classifier`) or V-JEPA 2 (`classifiers`, several trained at once), or a folder of transformers'
            VJEPA2ForVideoClassification.
        num_heads: Attention heads, where the file does not say.
        index: Which of several probes.
        use_proj: Whether the output projection of the cross-attention is applied. Released probes were trained without
            it, even where the file has weights for it; that is the default for them.

    Raises:
        ConfigError: An argument is missing.
        CheckpointError: The file is damaged, or holds no probe.
    """
    from tubelet.probing import head_file  # here, as that package reads its encoders from this one

    path = Path(path)
    if (path / "config.json").is_file():
        config, tensors = _read_transformers(path)
        state = _probe_from_transformers(tensors)
        return _classifier(path, state, num_heads or config["num_attention_heads"], False, config["layer_norm_eps"])
    file = path
    if path.is_dir():
        file = path / head_file.NAME if (path / head_file.NAME).is_file() else path / "probe.pt"
    if file.suffix == ".safetensors":
        return head_file.read(file)
    checkpoint_v1.check_intact(file)
    content = checkpoint_v1.read_file(file)
    if "classifiers" in content:
        probes = content["classifiers"]
        if index is None and len(probes) > 1:
            raise ConfigError(f"{file}: holds {len(probes)} probes; choose one with index=0 to {len(probes) - 1}")
        state = probes[index or 0]
    elif "classifier" in content:
        state = content["classifier"]
    else:
        raise checkpoint.CheckpointError(f"{file}: no probe in it; it holds {', '.join(content)}")
    state = _without_prefixes(state)
    if "config" not in content:
        return _classifier(file, state, num_heads, bool(use_proj))
    if "pooler.query_tokens" in state:
        return _classifier(file, state, num_heads or content.get("num_heads"), use_proj is not False)
    num_classes, embed_dim = state["linear.weight"].shape
    return head_file.build({"head": "linear", "embed_dim": embed_dim, "num_classes": num_classes}, state, file)


def export(path: str | Path, folder: str | Path, checkpoint_key: str = "target_encoder", **arguments: Any) -> None:
    """Write an encoder as a folder that `transformers.VJEPA2Model.from_pretrained` loads.

    The predictor is exported too if it has mask tokens; otherwise transformers initializes a new one unless it is
    called with `skip_predictor=True`. Path and arguments as for `load_encoder`.

    Raises:
        ConfigError: transformers does not support the architecture. It has to have rotary positions with V-JEPA 2's
            pairing (`use_rope: true`, `rope_pairing: vjepa2`), MLPs, and square clips.
    """
    weights = read(path)
    encoder: Any = weights.load_encoder(checkpoint_key, **arguments)
    _check_exportable(encoder, path)
    block, norm = encoder.blocks[0], encoder.norm
    tubelet_size, patch_size, _ = encoder.patch_embed.proj.kernel_size
    config = {
        "architectures": ["VJEPA2Model"],
        "model_type": "vjepa2",
        "patch_size": patch_size,
        "tubelet_size": tubelet_size,
        "crop_size": encoder.grid[1] * patch_size,
        "frames_per_clip": encoder.grid[0] * tubelet_size,
        "in_chans": encoder.patch_embed.proj.in_channels,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / encoder.embed_dim,
        "qkv_bias": block.attn.qkv.bias is not None,
        "layer_norm_eps": norm.eps,
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
    }
    tensors = _to_transformers(encoder.state_dict())
    if "predictor" in weights.parts and "mask_tokens.0" in weights.part("predictor"):
        predictor: Any = weights.load_predictor(**arguments)
        config |= {
            "pred_hidden_size": predictor.predictor_embed_dim,
            "pred_num_hidden_layers": len(predictor.predictor_blocks),
            "pred_num_attention_heads": predictor.num_heads,
            "pred_num_mask_tokens": len(predictor.mask_tokens),
            "pred_mlp_ratio": predictor.predictor_blocks[0].mlp.fc1.out_features / predictor.predictor_embed_dim,
        }
        tensors |= _to_transformers(predictor.state_dict())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_parts(path: str | Path) -> dict[str, State]:
    """Read the state dicts of a file or folder, with Tubelet's names: all parts of a run, or encoders and predictor."""
    weights = read(path)
    return {name: _without_fixed_positions(state) for name, state in weights.parts.items()}


def read(path: str | Path) -> "Weights":
    """Open the file or folder `path`; its content determines the subclass of `Weights`."""
    path = Path(path)
    if (path / "config.json").is_file():
        config, tensors = _read_transformers(path)
        encoder = _from_transformers(tensors, "encoder")
        parts = {"encoder": encoder, "target_encoder": encoder}
        parts["predictor"] = _from_transformers(tensors, "predictor")
        return TransformersWeights(path, parts, config)
    file = checkpoint.locate(path)
    metadata = checkpoint.read_metadata(file)
    stored = _Parts(file, metadata)
    if "target_encoder" not in stored and "predictor" not in stored:
        raise checkpoint.CheckpointError(
            f"{file}: no encoder or predictor in it; it holds {', '.join([*checkpoint.parts(file), *metadata])}"
        )
    kind = OwnWeights if "config" in metadata else ReleasedWeights
    return kind(file, stored, metadata.get("config", {}))


class _Parts(Mapping[str, State]):
    """State dicts of a checkpoint, each read and verified on first access.

    Of a released file, which holds optimizers and more, only encoders and predictor are parts.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self._path = path
        stored = checkpoint.parts(path)
        if "config" not in metadata:
            stored = [name for name in stored if name in ("encoder", "target_encoder", "predictor")]
        self._stored_as: dict[str, str] = {name: name for name in stored}
        encoders = metadata.get("encoders") or [name for name in ("target_encoder", "encoder") if name in stored]
        if encoders:
            self._stored_as.setdefault("target_encoder", encoders[0])
        self._read: dict[str, State] = {}

    def __getitem__(self, name: str) -> State:
        stored_as = self._stored_as[name]
        if stored_as not in self._read:
            if not self._read:
                checkpoint.check_intact(self._path, "weights")
            self._read[stored_as] = _without_prefixes(checkpoint.read_weights(self._path, [stored_as])[stored_as])
        return self._read[stored_as]

    def __contains__(self, name: object) -> bool:
        return name in self._stored_as  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored_as)

    def __len__(self) -> int:
        return len(self._stored_as)


@dataclass(frozen=True)
class Weights:
    """State dicts with Tubelet's names, and what the file says about the architecture."""

    path: Path
    parts: Mapping[str, State]
    config: dict[str, Any]

    def load_encoder(self, checkpoint_key: str = "target_encoder", **arguments: Any) -> Encoder:
        """See `hub.load_encoder`."""
        encoder = self.build_encoder(arguments)
        state = self.part(checkpoint_key)
        checkpoint.load_weights(encoder, self.without_positions(state, encoder), f"{checkpoint_key} of {self.path}")
        return encoder

    def load_predictor(self, checkpoint_key: str = "predictor", **arguments: Any) -> Predictor:
        """See `hub.load_predictor`."""
        state = self.part(checkpoint_key)
        predictor = self.build_predictor(arguments, state)
        checkpoint.load_weights(predictor, self.without_positions(state, predictor), f"{checkpoint_key} of {self.path}")
        return predictor

    def part(self, name: str) -> State:
        if name not in self.parts:
            raise ConfigError(f"{self.path}: '{name}' is not in the file. {nearest(name, self.parts)}")
        return self.parts[name]

    def without_positions(self, state: State, module: Any) -> State:
        """Drop the fixed sin-cos positions. Raises ConfigError if they differ from those of the module."""
        stored = {name: state[name] for name in _FIXED_POSITIONS if name in state}
        if stored and not module.positions.use_rope:
            (name, theirs), ours = *stored.items(), module.positions.pos_embed
            if theirs.shape != ours.shape:
                raise ConfigError(
                    f"{self.path}: {name} is {list(theirs.shape)}, but {list(ours.shape)} for the sizes given; give "
                    "img_size, num_frames, patch_size and tubelet_size as in training (clips of other sizes still work)"
                )
            if not torch.allclose(theirs.float(), ours, atol=1e-3):
                raise ConfigError(
                    f"{self.path}: {name} differs from the positions of the arguments given; "
                    f"try uniform_power={not module.positions.uniform_power}, and check img_size and num_frames"
                )
        return _without_fixed_positions(state)

    def architecture(self) -> dict[str, Any]:
        """Return the options of `encoder`, `predictor` and `sizes` that the file has."""
        raise NotImplementedError

    def normalization(self) -> dict[str, tuple[float, ...]]:
        """Return `normalize_mean` and `normalize_std` of the training clips, where the file has them."""
        return {}

    def build_encoder(self, arguments: dict[str, Any]) -> Encoder:
        """Build the encoder as the file says and `arguments` of `load_encoder` change it, with random weights."""
        options, clip = self._options(arguments)
        return build_encoder(options.encoder, clip)

    def build_predictor(self, arguments: dict[str, Any], state: State) -> Predictor:
        """Build the predictor of the sizes of `state`, with random weights."""
        num_mask_tokens = _count(state, r"mask_tokens\.(\d+)")
        known = {
            "depth": _count(state, r"predictor_blocks\.(\d+)\."),
            "embed_dim": state["predictor_embed.weight"].shape[0],
            "use_mask_tokens": num_mask_tokens > 0,
        }
        options, clip = self._options(arguments, known)
        with torch.device("meta"):
            encoder = build_encoder(options.encoder, clip)
        return build_predictor(options.predictor, encoder, clip, max(1, num_mask_tokens))

    def _options(
        self, arguments: dict[str, Any], predictor: dict[str, Any] | None = None
    ) -> tuple["Architecture", ClipShape]:
        """Merge the options of the file, `arguments`, and those known from the weights of the predictor."""
        raw = merge(self.architecture(), _as_sections(arguments))
        sizes = {"img_size": 224, "num_frames": 16, "patch_size": 16, "tubelet_size": 2, **raw.pop("sizes")}
        raw = merge(raw, {"predictor": predictor or {}}) | {"encoder": drop_lacking_defaults(raw["encoder"])}
        options = check(raw, Architecture, self.path)
        return options, ClipShape(sizes["num_frames"], sizes["img_size"], sizes["patch_size"], sizes["tubelet_size"])


class Architecture(Config):
    """Options of the parts of a file of weights."""

    encoder: EncoderOptions
    predictor: PredictorOptions


def _as_sections(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments of `load_encoder` by part: mappings to merge into `encoder`, `predictor` and `sizes`."""
    rest = dict(arguments)
    sizes = {name: rest.pop(name) for name in ("img_size", "num_frames", "patch_size", "tubelet_size") if name in rest}
    # A string is V-JEPA's and 0.1's way to name the encoder's file.
    encoder = rest.pop("encoder") if isinstance(rest.get("encoder"), dict) else {}
    predictor = rest.pop("predictor", {})
    translation = Translation("vjepa", quiet=True)
    flat = {alias.old.removeprefix("model.").removesuffix(".*") for alias in translation.table}
    old = translation.layer({"model": {name: rest.pop(name) for name in list(rest) if name in flat}})
    encoder = merge(merge(old.get("encoder", {}), encoder), rest)
    predictor = merge(old.get("objective", {}).get("predictor", {}), predictor)
    return {"encoder": encoder, "predictor": predictor, "sizes": sizes}


class OwnWeights(Weights):
    """A checkpoint of Tubelet, which holds the complete configuration."""

    def architecture(self) -> dict[str, Any]:
        config = to_canonical(self.config, "vjepa")
        clip = config.get("clip") or config["data"]
        sizes = {"img_size": clip["crop_size"]} | {n: clip[n] for n in ("num_frames", "patch_size", "tubelet_size")}
        predictor = (config.get("objective") or {}).get("predictor") or {}
        return {"encoder": config["encoder"], "predictor": predictor, "sizes": sizes}

    def normalization(self) -> dict[str, tuple[float, ...]]:
        section = self.config.get("data_aug", {})
        return {name: tuple(section[name]) for name in NORMALIZATION if name in section}


class ReleasedWeights(Weights):
    """A file of V-JEPA or V-JEPA 2, which does not say the architecture."""

    def architecture(self) -> dict[str, Any]:
        options = {"uniform_power": False, "rope_pairing": "vjepa2"}
        return {"encoder": options, "predictor": options, "sizes": {}}

    def _options(
        self, arguments: dict[str, Any], predictor: dict[str, Any] | None = None
    ) -> tuple[Architecture, ClipShape]:
        if "name" not in _as_sections(arguments)["encoder"]:
            raise ConfigError(f"{self.path}: it does not say which encoder it holds; give model_name='vit_large', …")
        return super()._options(arguments, predictor)


class TransformersWeights(Weights):
    """A folder of transformers' VJEPA2Model, whose config.json has the architecture."""

    def architecture(self) -> dict[str, Any]:
        c = self.config
        rope = {"use_rope": True, "rope_pairing": "vjepa2"}
        encoder = {
            **rope,
            "embed_dim": c["hidden_size"],
            "depth": c["num_hidden_layers"],
            "num_heads": c["num_attention_heads"],
            "mlp_ratio": c["mlp_ratio"],
            "qkv_bias": c["qkv_bias"],
            "in_chans": c["in_chans"],
        }
        sizes = {"img_size": c["crop_size"], "num_frames": c["frames_per_clip"]}
        sizes |= {"patch_size": c["patch_size"], "tubelet_size": c["tubelet_size"]}
        return {"encoder": encoder, "predictor": {**rope, "num_heads": c["pred_num_attention_heads"]}, "sizes": sizes}


def _without_prefixes(state: State) -> State:
    """Strip the prefixes `module.` (DistributedDataParallel) and `backbone.` (mask wrapper) of released files."""
    return {name.removeprefix("module.").removeprefix("backbone."): tensor for name, tensor in state.items()}


_FIXED_POSITIONS = ("pos_embed", "predictor_pos_embed")


def _without_fixed_positions(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name not in _FIXED_POSITIONS}


def _count(state: State, pattern: str) -> int:
    """Count the distinct values of the pattern's group among the names in the state dict."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


# ---------------------------------------------------------------- probes


def _classifier(
    path: Path, state: State, num_heads: int | None, use_proj: bool, norm_eps: float = 1e-5
) -> AttentiveClassifier:
    """Build an attentive classifier with the sizes of the state dict, and load it."""
    if num_heads is None:
        raise ConfigError(f"{path}: the file does not say how many attention heads the probe has; give num_heads=…")
    if "pooler.query_tokens" not in state:
        raise checkpoint.CheckpointError(f"{path}: no attentive probe; its keys are {', '.join(state)}")
    block = "pooler.cross_attention_block."
    complete = f"{block}mlp.fc1.weight" in state
    if not use_proj:
        attention = f"{block}xattn." if complete else block
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{attention}proj.")}
    num_classes, embed_dim = state["linear.weight"].shape
    probe = AttentiveClassifier(
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_ratio=len(state[f"{block}mlp.fc1.weight"]) / embed_dim if complete else 4.0,
        depth=1 + _count(state, r"pooler\.blocks\.(\d+)\."),
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        qkv_bias=f"{block}xattn.q.bias" in state or f"{block}q.bias" in state,
        num_classes=num_classes,
        complete_block=complete,
        use_proj=use_proj,
    )
    checkpoint.load_weights(probe, state, f"probe of {path}")
    return probe


# ---------------------------------------------------------------- transformers

# config.json omits values that equal these.
_TRANSFORMERS_DEFAULTS = {
    "patch_size": 16,
    "crop_size": 256,
    "frames_per_clip": 64,
    "tubelet_size": 2,
    "hidden_size": 1024,
    "in_chans": 3,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "mlp_ratio": 4.0,
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "pred_num_attention_heads": 12,
}

# Prefixes of parameter names: Tubelet's -> transformers'.
_PREFIXES = {
    "patch_embed.": "encoder.embeddings.patch_embeddings.",
    "blocks.": "encoder.layer.",
    "norm.": "encoder.layernorm.",
    "predictor_embed.": "predictor.embeddings.predictor_embeddings.",
    "predictor_blocks.": "predictor.layer.",
    "predictor_norm.": "predictor.layernorm.",
    "predictor_proj.": "predictor.proj.",
}
_MASK_TOKENS = "predictor.embeddings.mask_tokens"
_PROBE_NAMES = {
    "cross_attention_layer.": "cross_attention_block.",
    "self_attention_layers.": "blocks.",
    "layer_norm": "norm",
    "cross_attn.q_proj.": "xattn.q.",
    "cross_attn.": "xattn.",
    "self_attn.out_proj.": "attn.proj.",
    "self_attn.": "attn.",
    "classifier.": "linear.",
}


def _read_transformers(folder: Path) -> tuple[dict[str, Any], State]:
    """Read config.json, completed with the defaults, and all tensors of a VJEPA2 folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "vjepa2":
        raise ConfigError(f"{folder}/config.json: model_type is '{config.get('model_type')}', not 'vjepa2'")
    config = {**_TRANSFORMERS_DEFAULTS, **config}
    if config["hidden_act"] != "gelu" or config["layer_norm_eps"] != 1e-6:
        raise ConfigError(f"{folder}/config.json: only hidden_act 'gelu' and layer_norm_eps 1e-6 can be read")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise checkpoint.CheckpointError(f"{folder}: no *.safetensors beside config.json")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    return config, {name.removeprefix("vjepa2."): tensor for name, tensor in tensors.items()}


def _from_transformers(tensors: State, part: str) -> State:
    """Return the state dict of `part`, encoder or predictor, with Tubelet's names; unknown names stay as they are."""
    state: State = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{part}."):
            continue
        if name == _MASK_TOKENS:
            state |= {f"mask_tokens.{i}": token for i, token in enumerate(tensor)}
            continue
        for ours, theirs in _PREFIXES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        state[name.replace(".attention.", ".attn.")] = tensor
    return _merged(state, "attn.qkv", ("attn.query", "attn.key", "attn.value"))


def _to_transformers(state: State) -> State:
    """Return a state dict of Tubelet with transformers' names."""
    tensors = {}
    for name, tensor in state.items():
        if name.startswith("mask_tokens."):
            continue
        ours = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
        name = _PREFIXES[ours] + name.removeprefix(ours).replace(".attn.", ".attention.")
        if ".qkv." in name:
            for kind, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[name.replace("qkv", kind)] = third.clone()
        else:
            tensors[name] = tensor.clone()
    tokens = [tensor for name, tensor in state.items() if name.startswith("mask_tokens.")]
    return tensors | ({_MASK_TOKENS: torch.stack(tokens)} if tokens else {})


def _probe_from_transformers(tensors: State) -> State:
    """Return pooler and classifier of a VJEPA2ForVideoClassification with Tubelet's names."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(("pooler.", "classifier.")):
            for theirs, ours in _PROBE_NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor
    state = _merged(state, "xattn.kv", ("xattn.k_proj", "xattn.v_proj"))
    return _merged(state, "attn.qkv", ("attn.q_proj", "attn.k_proj", "attn.v_proj"))


def _merged(state: State, together: str, apart: tuple[str, ...]) -> State:
    """Concatenate the separate layers `apart`, such as queries, keys and values, to the layer `together`."""
    merged = {}
    for name, tensor in state.items():
        if f".{apart[0]}." in name:
            rows = [state[name.replace(apart[0], other)] for other in apart]
            merged[name.replace(apart[0], together)] = torch.cat(rows)
        elif not any(f".{other}." in name for other in apart):
            merged[name] = tensor
    return merged


def _check_exportable(encoder: nn.Module, path: str | Path) -> None:
    if not isinstance(encoder, VisionTransformer):
        raise ConfigError(f"{path}: {type(encoder).__name__} is not in transformers; only VisionTransformer is")
    block: Any = encoder.blocks[0]
    lacking = {
        "fixed sin-cos positions (use_rope: false)": not encoder.positions.use_rope,
        "rope_pairing: interleaved": encoder.positions.use_rope and encoder.positions.rope_pairing != "vjepa2",
        "SwiGLU layers (use_silu: true)": not isinstance(block.mlp, MLP),
        "images (num_frames: 1)": not encoder.is_video,
        "clips that are not square": encoder.grid[1] != encoder.grid[2],
        "block_causal attention": encoder.block_causal,
        "qk_scale": block.attn.scale != block.attn.head_dim**-0.5,
    }
    if any(lacking.values()):
        reasons = "; ".join(reason for reason, lacks in lacking.items() if lacks)
        raise ConfigError(f"{path}: transformers' VJEPA2Model does not have {reasons}. The run cannot be exported")
