"""Heads of trained and released probes."""

from functools import partial
from pathlib import Path

from torch import Tensor, nn

from tubelet.config import ConfigError
from tubelet.hub import transformers
from tubelet.hub.state import State, count, without_prefixes
from tubelet.models.attentive_pooler import AttentiveClassifier
from tubelet.runtime import checkpoint, checkpoint_v1, file_formats

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


def load(path: Path, num_heads: int | None, index: int | None, use_proj: bool | None) -> nn.Module:
    """See `hub.load_probe`."""
    from tubelet.probing import head_file  # here, as that package reads its encoders from this one

    if (path / "config.json").is_file():
        config, tensors = transformers.read(path)
        state = _from_transformers(tensors, path)
        return _classifier(path, state, num_heads or config.num_attention_heads, False, config.layer_norm_eps)
    file = path
    if path.is_dir():
        file = path / head_file.NAME if (path / head_file.NAME).is_file() else path / "probe.pt"
    if file.suffix == ".safetensors":
        return head_file.read(file)
    checkpoint_v1.check_intact(file)
    content = checkpoint_v1.read_file(file)
    if "classifiers" in content:
        probes = content["classifiers"]
        if not isinstance(probes, list | tuple) or not probes:
            raise checkpoint.CheckpointError(f"{file}: its classifiers are no list of state dicts; get the file again")
        if index is not None and not 0 <= index < len(probes):
            raise ConfigError(f"{file}: index={index}, but it holds {len(probes)} probes: 0 to {len(probes) - 1}")
        if index is None and len(probes) > 1:
            raise ConfigError(f"{file}: holds {len(probes)} probes; choose one with index=0 to {len(probes) - 1}")
        state = probes[index or 0]
    elif "classifier" in content:
        state = content["classifier"]
    else:
        raise checkpoint.CheckpointError(f"{file}: no probe in it; it holds {', '.join(content)}")
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise checkpoint.CheckpointError(f"{file}: its probe is no state dict; write {file_formats.SAVE_PROBE}")
    state = without_prefixes(state)
    if "config" not in content:
        return _classifier(file, state, num_heads, bool(use_proj))
    if "pooler.query_tokens" in state:
        return _classifier(file, state, num_heads or content.get("num_heads"), use_proj is not False)
    _check_has(file, state, "linear.weight")
    num_classes, embed_dim = state["linear.weight"].shape
    return head_file.build({"head": "linear", "embed_dim": embed_dim, "num_classes": num_classes}, state, file)


def _classifier(
    path: Path, state: State, num_heads: int | None, use_proj: bool, norm_eps: float = 1e-5
) -> AttentiveClassifier:
    """Build an attentive classifier with the sizes of the state dict, and load it."""
    block = "pooler.cross_attention_block."
    complete = f"{block}mlp.fc1.weight" in state
    _check_has(path, state, "pooler.query_tokens", "linear.weight")
    if num_heads is None:
        raise ConfigError(f"{path}: the file does not say how many attention heads the probe has; give num_heads=…")
    if not use_proj:
        attention = f"{block}xattn." if complete else block
        state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{attention}proj.")}
    num_classes, embed_dim = state["linear.weight"].shape
    probe = AttentiveClassifier(
        embed_dim=embed_dim,
        num_heads=num_heads,
        mlp_ratio=len(state[f"{block}mlp.fc1.weight"]) / embed_dim if complete else 4.0,
        depth=1 + count(state, r"pooler\.blocks\.(\d+)\."),
        norm_layer=partial(nn.LayerNorm, eps=norm_eps),
        qkv_bias=f"{block}xattn.q.bias" in state or f"{block}q.bias" in state,
        num_classes=num_classes,
        complete_block=complete,
        use_proj=use_proj,
    )
    checkpoint.load_weights(probe, state, f"probe of {path}")
    return probe


def _check_has(path: Path, state: State, *names: str) -> None:
    """Raise CheckpointError where a probe lacks one of its layers."""
    if missing := [name for name in names if name not in state]:
        keys = ", ".join(list(state)[:6]) or "none"
        raise checkpoint.CheckpointError(f"{path}: no attentive probe: it lacks {', '.join(missing)}; keys: {keys}")
    if state["linear.weight"].ndim != 2:
        raise checkpoint.CheckpointError(f"{path}: linear.weight has the shape {list(state['linear.weight'].shape)}")


def _from_transformers(tensors: State, folder: Path) -> State:
    """Return pooler and classifier of a VJEPA2ForVideoClassification with Tubelet's names."""
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(("pooler.", "classifier.")):
            for theirs, ours in _PROBE_NAMES.items():
                name = name.replace(theirs, ours)
            state[name] = tensor
    state = transformers.merge_layers(state, "xattn.kv", ("xattn.k_proj", "xattn.v_proj"), folder)
    return transformers.merge_layers(state, "attn.qkv", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), folder)
