"""Load weights: Tubelet's runs, V-JEPA `.pth.tar`, V-JEPA 2 and 2.1 `.pt`, folders of transformers' VJEPA2Model.

No code from a file is executed. Missing or unexpected keys are an error that lists them.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from tubelet.hub import probe, released, transformers
from tubelet.hub.weights import OwnWeights, Parts, State, Weights, without_fixed_positions, without_unused
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.runtime import checkpoint

logger = logging.getLogger(__name__)


def load_encoder(path: str | Path, checkpoint_key: str = "target_encoder", **arguments: Any) -> Encoder:
    """Load the encoder of a run folder, a checkpoint, a released file or a folder of transformers.

    Args:
        path: File or folder.
        checkpoint_key: Which encoder of the file: `target_encoder`, `encoder`, or another that the run's objective
            offers (`Objective.encoders`). `target_encoder` is the first of these where no part has that name; of a
            released file `ema_encoder`, and `encoder` where it has no moving average.
        arguments: What the file does not say, or what should differ: options of the encoder such as `out_layers`, by
            themselves or together in `encoder={"name": …, …}`; V-JEPA's names `model_name`, `uniform_power`,
            `use_rope`, …; and `img_size`, `num_frames`, `patch_size`, `tubelet_size`. V-JEPA and V-JEPA 2 files need
            `model_name`, `img_size` and `num_frames` as in their training; V-JEPA's take `uniform_power=True`,
            V-JEPA 2's `use_rope=True`. V-JEPA 2.1's files need nothing, but `num_heads` if the width is not a released
            one. The encoder takes clips of other sizes too; positions are then interpolated.

    Of V-JEPA 2.1, `encoder(clips, all_levels=True)` returns the tokens of all levels, and single frames are embedded by
    the image tokenizer. These weights do not require gradients, as fine-tuning on clips does not use them; `levels=1`
    and `image_tokenizer=False` leave them out.

    Raises ConfigError for unknown or missing arguments, CheckpointError where the weights do not fit the encoder.

    >>> encoder = load_encoder("vitl16.pth.tar", model_name="vit_large", num_frames=16, uniform_power=True)
    """
    return read(path).load_encoder(checkpoint_key, **arguments)


def load_predictor(path: str | Path, checkpoint_key: str = "predictor", **arguments: Any) -> Predictor:
    """Load the predictor of a pretraining; path, arguments and errors as for `load_encoder`.

    Its depth, width and number of mask tokens are read from the weights. The number of heads, `pred_num_heads` or
    `predictor={"num_heads": …}`, is the encoder's by default, as in V-JEPA; V-JEPA 2's released predictors have 12,
    which is the default for V-JEPA 2.1's. Of the latter's mask tokens only the first was trained. Indices of tokens
    refer to clips of `img_size` and `num_frames`, by default those of the training; of V-JEPA 2.1 384 and 64.
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
    return probe.load(Path(path), num_heads, index, use_proj)


def export(path: str | Path, folder: str | Path, checkpoint_key: str = "target_encoder", **arguments: Any) -> None:
    """Write an encoder as a folder that `transformers.VJEPA2Model.from_pretrained` loads.

    The predictor is exported too if it has mask tokens; otherwise transformers initializes a new one unless it is
    called with `skip_predictor=True`. Path and arguments as for `load_encoder`.

    Raises:
        ConfigError: transformers does not support the architecture. It has to have rotary positions with V-JEPA 2's
            pairing (`use_rope: true`, `rope_pairing: vjepa2`), MLPs, and square clips.
    """
    transformers.write(read(path), Path(folder), checkpoint_key, arguments)


def read_parts(path: str | Path, modules: Mapping[str, nn.Module] = MappingProxyType({})) -> dict[str, State]:
    """Read the state dicts of a file or folder, with Tubelet's names: all parts of a run, or encoders and predictor.

    Args:
        path: File or folder.
        modules: Modules by the names of the parts that they are to load; levels and image tokenizer are left out where
            a module is built without them.
    """
    parts = {name: without_fixed_positions(state) for name, state in read(path).parts.items()}
    return {name: without_unused(x, modules[name]) if name in modules else x for name, x in parts.items()}


def read(path: str | Path) -> Weights:
    """Open the file or folder `path`; its content determines the subclass of `Weights`."""
    path = Path(path)
    if (path / "config.json").is_file():
        config, tensors = transformers.read(path)
        encoder = transformers.to_tubelet(tensors, "encoder")
        predictor = transformers.to_tubelet(tensors, "predictor")
        states = {"encoder": encoder, "target_encoder": encoder, "predictor": predictor}
        return transformers.TransformersWeights(path, states, config)
    file = checkpoint.locate(path)
    metadata = checkpoint.read_metadata(file)
    stored, is_own = checkpoint.parts(file), "config" in metadata
    names = stored if is_own else [name for name in stored if name in released.PARTS]
    parts = Parts(file, names, metadata.get("encoders") or released.AVERAGES, released.to_tubelet)
    if "target_encoder" not in parts and "predictor" not in parts:
        raise checkpoint.CheckpointError(
            f"{file}: no encoder or predictor in it; it holds {', '.join([*stored, *metadata])}"
        )
    if is_own:
        return OwnWeights(file, parts, metadata["config"])
    if {"target_encoder", "ema_encoder"} <= set(names):
        logger.warning("%s has a target_encoder and an ema_encoder; checkpoint_key chooses between them", file)
    kind = released.VJEPA21Weights if released.is_vjepa2_1(parts) else released.ReleasedWeights
    return kind(file, parts, {})
