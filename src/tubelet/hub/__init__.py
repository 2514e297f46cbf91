"""Load weights: Tubelet's runs, V-JEPA `.pth.tar`, V-JEPA 2 and 2.1 `.pt`, folders of transformers' VJEPA2Model.

No code from a file is executed. Missing or unexpected keys are an error that lists them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from tubelet.hub import files, fit, probe, saving, sound, transformers
from tubelet.hub.fit import check_normalization as check_normalization
from tubelet.hub.state import State, without_fixed_positions
from tubelet.hub.weights import OwnWeights as OwnWeights
from tubelet.hub.weights import Weights
from tubelet.models.interfaces import Encoder, Predictor
from tubelet.models.sound import SoundEncoder
from tubelet.runtime import checkpoint, file_formats


def load_encoder(path: str | Path, checkpoint_key: str = "target_encoder", **arguments: Any) -> Encoder:
    """Load the encoder of a run folder, a checkpoint, a released file or a folder of transformers.

    Runs and the published models of V-JEPA, V-JEPA 2 and V-JEPA 2.1 need no arguments. Of other files of their code,
    what neither shapes nor stored positions tell is asked for, such as `num_heads` and `use_rope`.

    Args:
        path: File or folder.
        checkpoint_key: Which encoder of the file: `target_encoder`, `encoder`, or another that the run's objective
            offers (`Objective.encoders`). `target_encoder` is the first of these where no part has that name; of a
            released file `ema_encoder`, and `encoder` where it has no moving average. The log says which one it is.
        arguments: What the file does not say, or what should be returned: options of the encoder such as `out_layers`,
            by themselves or together in `encoder={"name": …, …}`; V-JEPA's names `model_name`, `uniform_power`,
            `use_rope`, …; and `img_size`, `num_frames`, `patch_size`, `tubelet_size`. The encoder takes clips of other
            sizes anyway; sin-cos positions are then interpolated from those of the training.

    Of V-JEPA 2.1, `encoder(clips, all_levels=True)` returns the tokens of all levels, and single frames are embedded by
    the image tokenizer. These weights do not require gradients, as fine-tuning on clips does not use them; `levels=1`
    and `image_tokenizer=False` leave them out.

    Raises:
        ConfigError: An argument is unknown or missing, or the weights would mean something else under it.
        CheckpointError: The file cannot be read, or the weights do not fit the encoder.

    >>> encoder = load_encoder("vitl16.pth.tar")
    """
    return read(path).load_encoder(checkpoint_key, **arguments)


def load_predictor(path: str | Path, checkpoint_key: str = "predictor", **arguments: Any) -> Predictor:
    """Load the predictor of a pretraining; path, arguments and errors as for `load_encoder`.

    The number of heads, `pred_num_heads` or `predictor={"num_heads": …}`, is known of runs and published models.
    Indices of tokens refer to clips of `img_size` and `num_frames`, by default those of the training. Of V-JEPA 2.1's
    mask tokens only the first was trained.
    """
    return read(path).load_predictor(checkpoint_key, **arguments)


def load_sound_encoder(
    path: str | Path, checkpoint_key: str = "target_sound_encoder", *, weights: bool = True
) -> SoundEncoder:
    """Load the encoder of the sound of a run: sound [B, channels, samples] -> tokens [B, N, D].

    It takes sound of other durations, too; its positions are then interpolated.

    Args:
        path: Run folder or checkpoint, of pretraining with `objective: {name: audio_visual_jepa}` or of `app: audio`.
        checkpoint_key: Which encoder of the run: `target_sound_encoder`, or `sound_encoder`, which is also taken where
            there is no moving average.
        weights: Load the weights; false: leave the random ones that it is built with.

    Raises:
        CheckpointError: The file cannot be read, or holds no encoder of sound.
    """
    return sound.load(checkpoint.locate(Path(path)), checkpoint_key, weights)


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


def save(
    folder: str | Path,
    parts: Mapping[str, nn.Module],
    *,
    step: int = 0,
    normalization: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> Path:
    """Write modules that were trained without the Trainer, so that `load_encoder` and probes read them from `folder`.

    Args:
        folder: Folder of these weights only. Its other checkpoints are removed.
        parts: Modules of `build_encoder` and `build_predictor`, by names such as `target_encoder`, `encoder` and
            `predictor`. The encoder to evaluate comes first; all encoders have the same options.
        step: Steps of the training.
        normalization: `normalize_mean` and `normalize_std` of the clips. Probes refuse clips that are normalized in
            another way.

    Returns:
        The folder of the checkpoint.

    Raises:
        ConfigError: A module was built in another way, the modules do not belong together, or `folder` is that of a run
            of the Trainer.

    >>> save("runs/mine", {"target_encoder": target_encoder, "encoder": encoder, "predictor": predictor})
    """
    return saving.save(Path(folder), parts, step, normalization)


def export(path: str | Path, folder: str | Path, checkpoint_key: str = "target_encoder", **arguments: Any) -> None:
    """Write an encoder as a folder that `transformers.VJEPA2Model.from_pretrained` loads.

    The predictor is exported too if it has mask tokens; otherwise transformers initializes a new one unless it is
    called with `skip_predictor=True`. Path and arguments as for `load_encoder`.

    Raises:
        ConfigError: transformers does not support the architecture. It has to have rotary positions with V-JEPA 2's
            pairing (`use_rope: true`, `rope_pairing: vjepa2`), MLPs, and square clips.
    """
    transformers.write(read(path), Path(folder), checkpoint_key, arguments)


def read_parts(
    path: str | Path,
    modules: Mapping[str, nn.Module] = MappingProxyType({}),
    normalization: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> dict[str, State]:
    """Read the state dicts of a file or folder, with Tubelet's names: all parts of a run, or encoders and predictor.

    Args:
        path: File or folder.
        modules: Modules by the names of the parts that they are to load. Levels and image tokenizer are left out where
            a module is built without them, and mask tokens beyond those that it has.
        normalization: `normalize_mean` and `normalize_std` of the clips on which the modules are used.

    Raises:
        ConfigError: A module is of another architecture than the weights.
    """
    weights = read(path)
    fit.check(weights, modules, normalization)
    parts = {name: without_fixed_positions(state) for name, state in weights.parts.items()}
    return {name: fit.adapt(x, modules[name], path) if name in modules else x for name, x in parts.items()}


def read(path: str | Path) -> Weights:
    """Open the file or folder `path`; its content determines the subclass of `Weights`."""
    path = Path(path)
    if (path / "config.json").is_file():
        return transformers.open_folder(path)
    file = checkpoint.locate(path)
    if file.is_file() and file_formats.is_safetensors(file):
        return files.open_safetensors(file)
    metadata = checkpoint.read_metadata(file)
    return files.open_run(file, metadata) if "config" in metadata else files.open_released(file)
