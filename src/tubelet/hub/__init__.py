"""Reading weights: this software's runs, V-JEPA `.pth.tar`, V-JEPA 2 `.pt`, folders of transformers' VJEPA2Model.

No code from a file is executed. Keys that are missing or left over are an error that lists them.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tubelet.config import ConfigError, check, merge, nearest
from tubelet.data import NORMALIZATION
from tubelet.layers import MLP
from tubelet.models import ModelConfig, build_encoder, build_predictor
from tubelet.models.attentive_pooler import AttentiveClassifier
from tubelet.models.predictor import VisionTransformerPredictor
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.runtime import checkpoint

State = dict[str, Tensor]


def load_encoder(path: str | Path, checkpoint_key: str = "target_encoder", **arguments: Any) -> nn.Module:
    """The encoder in a run folder, a checkpoint, a released file or a folder of transformers.

    Args:
        path: file or folder.
        checkpoint_key: which of a file's encoders, `target_encoder` or `encoder`.
        arguments: what the file does not say, or what shall differ: the keys of the YAML section `model` (`model_name`,
            `uniform_power`, `use_rope`, ...), `img_size`, `num_frames`, `patch_size`, `tubelet_size`, and arguments of
            the encoder such as `out_layers`. V-JEPA and V-JEPA 2 files need `model_name`, `img_size` and `num_frames`
            as in their training; V-JEPA's take `uniform_power=True`, V-JEPA 2's `use_rope=True`. The encoder takes
            clips of other sizes too; positions are then interpolated.

    Raises ConfigError for unknown or missing arguments, CheckpointError where the weights do not fit the encoder.

    >>> encoder = load_encoder("vitl16.pth.tar", model_name="vit_large", num_frames=16, uniform_power=True)
    """
    weights = read(path)
    encoder = weights.build_encoder(arguments)
    state = weights.part(checkpoint_key)
    checkpoint.load_state(encoder, weights.without_positions(state, encoder), f"{checkpoint_key} of {path}")
    return encoder


def load_predictor(path: str | Path, checkpoint_key: str = "predictor", **arguments: Any) -> VisionTransformerPredictor:
    """The predictor beside an encoder; path, arguments and errors as for `load_encoder`.

    Its depth, width and number of mask tokens are read off the weights. The number of heads, `pred_num_heads`, is the
    encoder's where it is not given, as in V-JEPA; V-JEPA 2's released predictors have 12.
    """
    weights = read(path)
    state = weights.part(checkpoint_key)
    predictor = weights.build_predictor(arguments, state)
    checkpoint.load_state(predictor, weights.without_positions(state, predictor), f"{checkpoint_key} of {path}")
    return predictor


def load_probe(
    path: str | Path, num_heads: int | None = None, index: int | None = None, use_proj: bool | None = None
) -> nn.Module:
    """The trained probe in an evaluation's run folder (probe.pt) or a released file: tokens [B, N, D] -> [B, classes].

    Args:
        path: the folder, or a file of V-JEPA (`classifier`) or V-JEPA 2 (`classifiers`, several trained at once), or a
            folder of transformers' VJEPA2ForVideoClassification.
        num_heads: attention heads, where the file does not say.
        index: which of several probes.
        use_proj: whether the cross-attention's output projection acts. Released probes were trained without it, even
            where the file has weights for it; that is the default for them.

    Raises ConfigError for a missing argument, CheckpointError for weights that are no probe.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        config, tensors = _read_transformers(path)
        state = _probe_from_transformers(tensors)
        return _classifier(path, state, num_heads or config["num_attention_heads"], False, config["layer_norm_eps"])
    file = path / "probe.pt" if path.is_dir() else path
    content = checkpoint.read(file)
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
    from tubelet.probing.heads import LinearHead  # that package reads its encoders from here

    head = LinearHead(state["mean"], state["std"], len(state["linear.weight"]))
    checkpoint.load_state(head, state, f"probe of {file}")
    return head


def export(path: str | Path, folder: str | Path, checkpoint_key: str = "target_encoder", **arguments: Any) -> None:
    """Write an encoder as a folder that `transformers.VJEPA2Model.from_pretrained` loads.

    The predictor goes with it if it has mask tokens; else transformers initialises one of its own, which
    `skip_predictor=True` passes by. Path and arguments as for `load_encoder`.

    Raises ConfigError where the architecture is not transformers': it has rotary positions with V-JEPA 2's pairing
    (`model: {use_rope: true, rope_pairing: vjepa2}`), MLPs, and square clips.
    """
    weights = read(path)
    encoder = load_encoder(path, checkpoint_key, **arguments)
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
        predictor = load_predictor(path, **arguments)
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
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_parts(path: str | Path) -> dict[str, State]:
    """The state dicts `encoder`, `target_encoder` and `predictor` in a file or folder, in this software's names."""
    weights = read(path)
    return {name: _without_fixed_positions(state) for name, state in weights.parts.items()}


def read(path: str | Path) -> "Weights":
    """Whatever stands at `path`, its kind found out by its content."""
    path = Path(path)
    if not path.exists():
        raise checkpoint.CheckpointError(f"{path}: no such file or folder")
    if (path / "config.json").is_file():
        config, tensors = _read_transformers(path)
        encoder = _from_transformers(tensors, "encoder")
        parts = {"encoder": encoder, "target_encoder": encoder}
        parts["predictor"] = _from_transformers(tensors, "predictor")
        return TransformersWeights(path, parts, config)
    is_folder = path.is_dir() and path.suffix != ".dcp"  # a sharded checkpoint is a folder, too
    if is_folder and not (path / "checkpoints" / checkpoint.LATEST).exists():
        raise checkpoint.CheckpointError(
            f"{path}: neither a run folder (checkpoints/{checkpoint.LATEST}) nor a model folder (config.json)"
        )
    file = path / "checkpoints" / checkpoint.LATEST if is_folder else path
    content = checkpoint.read(file)
    names = [name for name in ("encoder", "target_encoder", "predictor") if name in content]
    parts = {name: _without_prefixes(content[name]) for name in names}
    if "encoder" in parts:
        parts.setdefault("target_encoder", parts["encoder"])  # supervised training has one encoder
    if not parts:
        raise checkpoint.CheckpointError(f"{file}: no encoder or predictor in it; it holds {', '.join(content)}")
    kind = OwnWeights if "config" in content else ReleasedWeights
    return kind(file, parts, content.get("config", {}))


@dataclass(frozen=True)
class Weights:
    """State dicts in this software's names, and what the file says about the architecture."""

    path: Path
    parts: dict[str, State]
    config: dict[str, Any]

    def part(self, name: str) -> State:
        if name not in self.parts:
            raise ConfigError(f"{self.path}: '{name}' is not in the file. {nearest(name, self.parts)}")
        return self.parts[name]

    def without_positions(self, state: State, module: nn.Module) -> State:
        """The state without fixed sin-cos positions. Raises ConfigError where they are not the module's own."""
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

    def sections(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What the file says of the sections `model` and `data`."""
        raise NotImplementedError

    def normalization(self) -> dict[str, tuple[float, ...]]:
        """`normalize_mean` and `normalize_std` of the clips that the weights were trained on, where the file says."""
        return {}

    def build_encoder(self, arguments: dict[str, Any]) -> nn.Module:
        """A new encoder, as the file says and `arguments` of `load_encoder` change it; its weights are only drawn."""
        model, sizes = self._options(arguments)
        return build_encoder(model, **sizes)

    def build_predictor(self, arguments: dict[str, Any], state: State) -> VisionTransformerPredictor:
        num_mask_tokens = _count(state, r"mask_tokens\.(\d+)")
        width = state["predictor_embed.weight"].shape[0]
        known = {"pred_depth": _count(state, r"predictor_blocks\.(\d+)\."), "pred_embed_dim": width}
        model, sizes = self._options({**arguments, **known, "use_mask_tokens": num_mask_tokens > 0})
        with torch.device("meta"):
            encoder = build_encoder(model, **sizes)
        return build_predictor(model, encoder, **sizes, num_mask_tokens=max(1, num_mask_tokens))

    def _options(self, arguments: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
        """The section `model` and the sizes: what the file says, with `arguments` laid on it."""
        section, data = self.sections()
        sizes = {"img_size": 224, "num_frames": 16, "patch_size": 16, "tubelet_size": 2, **data}
        sizes |= {name: value for name, value in arguments.items() if name in sizes}
        fields = {name: value for name, value in arguments.items() if name in ModelConfig.model_fields}
        rest = {name: value for name, value in arguments.items() if name not in sizes and name not in fields}
        raw = merge(section, fields)
        raw["encoder_args"] = {**raw.get("encoder_args", {}), **rest}
        model = check(raw, ModelConfig, self.path)
        return model, {"crop_size": sizes.pop("img_size"), **sizes}


class OwnWeights(Weights):
    """A checkpoint of this software: its configuration says all."""

    def sections(self) -> tuple[dict[str, Any], dict[str, Any]]:
        data = self.config["data"]
        sizes = {"img_size": data["crop_size"]}
        return self.config["model"], sizes | {name: data[name] for name in ("num_frames", "patch_size", "tubelet_size")}

    def normalization(self) -> dict[str, tuple[float, ...]]:
        section = self.config.get("data_aug", {})
        return {name: tuple(section[name]) for name in NORMALIZATION if name in section}


class ReleasedWeights(Weights):
    """A file of V-JEPA or V-JEPA 2, which says nothing of the architecture."""

    def sections(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"uniform_power": False, "rope_pairing": "vjepa2"}, {}

    def _options(self, arguments: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
        if "model_name" not in arguments:
            raise ConfigError(f"{self.path}: it does not say which encoder it holds; give model_name='vit_large', …")
        return super()._options(arguments)


class TransformersWeights(Weights):
    """A folder of transformers' VJEPA2Model: config.json says all."""

    def sections(self) -> tuple[dict[str, Any], dict[str, Any]]:
        c = self.config
        section = {
            "use_rope": True,
            "rope_pairing": "vjepa2",
            "pred_num_heads": c["pred_num_attention_heads"],
            "encoder_args": {
                "embed_dim": c["hidden_size"],
                "depth": c["num_hidden_layers"],
                "num_heads": c["num_attention_heads"],
                "mlp_ratio": c["mlp_ratio"],
                "qkv_bias": c["qkv_bias"],
                "in_chans": c["in_chans"],
            },
        }
        sizes = {"img_size": c["crop_size"], "num_frames": c["frames_per_clip"]}
        return section, sizes | {"patch_size": c["patch_size"], "tubelet_size": c["tubelet_size"]}


def _without_prefixes(state: State) -> State:
    """Released files wrap their modules in DistributedDataParallel (`module.`) and a mask wrapper (`backbone.`)."""
    return {name.removeprefix("module.").removeprefix("backbone."): tensor for name, tensor in state.items()}


_FIXED_POSITIONS = ("pos_embed", "predictor_pos_embed")


def _without_fixed_positions(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name not in _FIXED_POSITIONS}


def _count(state: State, pattern: str) -> int:
    """How many numbers stand in the names at the place of the pattern's group."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


# ---------------------------------------------------------------- probes


def _classifier(
    path: Path, state: State, num_heads: int | None, use_proj: bool, norm_eps: float = 1e-5
) -> AttentiveClassifier:
    """An attentive classifier of the state's sizes, with its weights."""
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
    checkpoint.load_state(probe, state, f"probe of {path}")
    return probe


# ---------------------------------------------------------------- transformers

# config.json leaves out what equals these.
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

# Beginnings of names: this software's, transformers'.
_BEGINNINGS = {
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
    """config.json with its defaults, and all tensors, of a VJEPA2 folder."""
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
    """The state dict of `part`, encoder or predictor, in this software's names; unknown names stay as they are."""
    state = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"{part}."):
            continue
        if name == _MASK_TOKENS:
            state |= {f"mask_tokens.{i}": token for i, token in enumerate(tensor)}
            continue
        for ours, theirs in _BEGINNINGS.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        state[name.replace(".attention.", ".attn.")] = tensor
    return _merged(state, "attn.qkv", ("attn.query", "attn.key", "attn.value"))


def _to_transformers(state: State) -> State:
    """A state dict of this software in transformers' names."""
    tensors = {}
    for name, tensor in state.items():
        if name.startswith("mask_tokens."):
            continue
        ours = next(beginning for beginning in _BEGINNINGS if name.startswith(beginning))
        name = _BEGINNINGS[ours] + name.removeprefix(ours).replace(".attn.", ".attention.")
        if ".qkv." in name:
            for kind, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[name.replace("qkv", kind)] = third.clone()
        else:
            tensors[name] = tensor.clone()
    tokens = [tensor for name, tensor in state.items() if name.startswith("mask_tokens.")]
    return tensors | ({_MASK_TOKENS: torch.stack(tokens)} if tokens else {})


def _probe_from_transformers(tensors: State) -> State:
    """The pooler and classifier of a VJEPA2ForVideoClassification in this software's names."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(("pooler.", "classifier.")):
            for theirs, ours in _PROBE_NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor
    state = _merged(state, "xattn.kv", ("xattn.k_proj", "xattn.v_proj"))
    return _merged(state, "attn.qkv", ("attn.q_proj", "attn.k_proj", "attn.v_proj"))


def _merged(state: State, together: str, apart: tuple[str, ...]) -> State:
    """The state with layers that stand apart there put into one."""
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
        raise ConfigError(f"{path}: {type(encoder).__name__} is not in transformers; only VisionTransformer can go")
    block = encoder.blocks[0]
    lacking = {
        "fixed sin-cos positions (use_rope: false)": not encoder.positions.use_rope,
        "rope_pairing: interleaved": encoder.positions.use_rope and encoder.positions.rope_pairing != "vjepa2",
        "SwiGLU layers (use_silu: true)": not isinstance(block.mlp, MLP),
        "images (num_frames: 1)": not encoder.is_video,
        "clips that are not square": encoder.grid[1] != encoder.grid[2],
        "qk_scale": block.attn.scale != block.attn.head_dim**-0.5,
    }
    if any(lacking.values()):
        reasons = "; ".join(reason for reason, lacks in lacking.items() if lacks)
        raise ConfigError(f"{path}: transformers' VJEPA2Model does not have {reasons}. The run cannot be exported")
