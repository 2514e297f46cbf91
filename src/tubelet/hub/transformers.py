"""Folders of transformers' VJEPA2Model: reading and writing."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from tubelet.config import Config, ConfigError, check
from tubelet.hub.architecture import Facts, facts_of
from tubelet.hub.state import IMAGENET, State
from tubelet.hub.weights import Weights
from tubelet.layers import MLP
from tubelet.models.vision_transformer import VisionTransformer
from tubelet.runtime import checkpoint, file_formats
from tubelet.runtime.files import save_tensors


class ModelConfig(Config):
    """What is needed of config.json, which omits values that equal these defaults."""

    model_config = pydantic.ConfigDict(extra="ignore")

    patch_size: PositiveInt = 16
    crop_size: PositiveInt = 256
    frames_per_clip: PositiveInt = 64
    tubelet_size: PositiveInt = 2
    hidden_size: PositiveInt = 1024
    in_chans: PositiveInt = 3
    num_attention_heads: PositiveInt = 16
    num_hidden_layers: PositiveInt = 24
    mlp_ratio: float = 4.0
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    pred_num_attention_heads: PositiveInt = 12


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
_ROPE = {"use_rope": True, "rope_pairing": "vjepa2"}
_MASK_TOKENS = "predictor.embeddings.mask_tokens"


def read(folder: Path) -> tuple[ModelConfig, State]:
    """Read config.json, completed with the defaults, and all tensors of a VJEPA2 folder."""
    file = folder / "config.json"
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON ({error}); get it again") from None
    if not isinstance(raw, dict) or raw.get("model_type") != "vjepa2":
        found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
        raise ConfigError(
            f"{file}: model_type is '{found}', not 'vjepa2'; only VJEPA2 models of transformers can be read"
        )
    config = check({name: value for name, value in raw.items() if value is not None}, ModelConfig, file)
    if config.hidden_act != "gelu" or config.layer_norm_eps != 1e-6:
        raise ConfigError(f"{file}: only hidden_act 'gelu' and layer_norm_eps 1e-6 can be read")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise checkpoint.CheckpointError(
            f"{folder}: no *.safetensors beside config.json; of pytorch_model.bin, write them with "
            "VJEPA2Model.from_pretrained(folder).save_pretrained(new_folder)"
        )
    tensors = {name: tensor for file in files for name, tensor in read_tensors(file).items()}
    return config, {name.removeprefix("vjepa2."): tensor for name, tensor in tensors.items()}


def read_tensors(file: Path) -> State:
    """Read a file of safetensors."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise checkpoint.CheckpointError(f"{file}: {file_formats.unreadable(file)} ({error})") from None


def to_tubelet(tensors: State, part: str, folder: Path) -> State:
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
    return merge_layers(state, "attn.qkv", ("attn.query", "attn.key", "attn.value"), folder)


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


def merge_layers(state: State, together: str, apart: tuple[str, ...], folder: Path) -> State:
    """Concatenate the separate layers `apart`, such as queries, keys and values, to the layer `together`."""
    merged = {}
    for name, tensor in state.items():
        if f".{apart[0]}." in name:
            names = [name.replace(apart[0], other) for other in apart]
            if missing := [name for name in names if name not in state]:
                raise checkpoint.CheckpointError(
                    f"{folder}: the weights lack {', '.join(missing)}; get the folder again"
                )
            rows = [state[name] for name in names]
            merged[name.replace(apart[0], together)] = torch.cat(rows)
        elif not any(f".{other}." in name for other in apart):
            merged[name] = tensor
    return merged


@dataclass(frozen=True)
class TransformersWeights(Weights):
    """A folder of transformers' VJEPA2Model, whose config.json has the architecture."""

    model: ModelConfig

    def facts(self) -> Facts:
        c = self.model
        encoder = {
            "embed_dim": c.hidden_size,
            "depth": c.num_hidden_layers,
            "num_heads": c.num_attention_heads,
            "mlp_ratio": c.mlp_ratio,
            "qkv_bias": c.qkv_bias,
            "in_chans": c.in_chans,
        }
        sizes = {"img_size": c.crop_size, "num_frames": c.frames_per_clip}
        sizes |= {"patch_size": c.patch_size, "tubelet_size": c.tubelet_size}
        return {
            **facts_of("encoder", _ROPE, "in transformers' VJEPA2Model"),
            **facts_of("encoder", encoder, "in its config.json"),
            **facts_of("sizes", sizes, "in its config.json"),
        }

    def predictor_facts(self, state: State) -> Facts:
        return {
            **super().predictor_facts(state),
            **facts_of("predictor", _ROPE, "in transformers' VJEPA2Model"),
            **facts_of("predictor", {"num_heads": self.model.pred_num_attention_heads}, "in its config.json"),
        }

    def normalization(self) -> dict[str, tuple[float, ...]]:
        return dict(IMAGENET)


def open_folder(folder: Path) -> TransformersWeights:
    """Open a folder with the config.json of a VJEPA2Model."""
    model, tensors = read(folder)
    encoder, predictor = (to_tubelet(tensors, part, folder) for part in ("encoder", "predictor"))
    parts = {"encoder": encoder, "target_encoder": encoder} | ({"predictor": predictor} if predictor else {})
    if not encoder:
        raise checkpoint.CheckpointError(
            f"{folder}: no weights of an encoder in it; here are {', '.join(tensors)[:200]}"
        )
    return TransformersWeights(folder, parts, {}, model)


def write(weights: Weights, folder: Path, checkpoint_key: str, arguments: dict[str, Any]) -> None:
    """See `hub.export`."""
    encoder: Any = weights.load_encoder(checkpoint_key, **arguments)
    _check_exportable(encoder, weights.path)
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
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_exportable(encoder: nn.Module, path: Path) -> None:
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
        "several levels (levels, objective vjepa2_1)": len(encoder.levels) > 1,
        "image_tokenizer": encoder.image_tokenizer,
        "rope_extent": encoder.positions.rope_extent is not None,
        "subtract_mean_frame": encoder.subtract_mean_frame,
        "qk_scale": block.attn.scale != block.attn.head_dim**-0.5,
    }
    if any(lacking.values()):
        reasons = "; ".join(reason for reason, lacks in lacking.items() if lacks)
        raise ConfigError(f"{path}: transformers' VJEPA2Model does not have {reasons}. The run cannot be exported")
