"""The encoder of the sound of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tubelet.config import ConfigError
from tubelet.grid import SoundShape
from tubelet.hub.state import check_numbers
from tubelet.models.sound import SoundEncoder, SpectrogramConfig, build_sound_encoder
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointError


def check(file: Path, built_from: Mapping[str, Any]) -> None:
    """Raise ConfigError where the weights of a run's sound encoder mean something else in the one built here.

    The duration of the sound may differ, as positions are computed anew.
    """
    stored = checkpoint.read_metadata(file).get("sound_encoder") or {}
    trained, here = ({**x, "sound": {**x.get("sound", {}), "num_samples": None}} for x in (stored, built_from))
    differing = [
        f"  {section}.{name} is {trained[section].get(name)} in the training of the weights, here {value}"
        for section in ("sound_encoder", "spectrogram", "sound")
        for name, value in here[section].items()
        if section in trained and trained[section].get(name) != value
    ]
    if differing:
        raise ConfigError("\n".join([f"{file}: its encoder of sound is of another architecture:", *differing]))


def load(file: Path, checkpoint_key: str, weights: bool) -> SoundEncoder:
    """See `hub.load_sound_encoder`."""
    built_from = checkpoint.read_metadata(file).get("sound_encoder")
    if built_from is None:
        raise CheckpointError(f"{file}: no encoder of sound in it; give a run that was trained with sound")
    spectrogram, shape = SpectrogramConfig(**built_from["spectrogram"]), SoundShape(**built_from["sound"])
    encoder = build_sound_encoder(built_from["sound_encoder"], spectrogram, shape)
    if weights:
        checkpoint.check_intact(file, "weights")
        parts = checkpoint.parts(file)
        if checkpoint_key == "target_sound_encoder" and checkpoint_key not in parts:
            checkpoint_key = "sound_encoder"
        if checkpoint_key not in parts:
            raise CheckpointError(f"{file}: '{checkpoint_key}' is not in it; it holds {', '.join(parts)}")
        state, what = checkpoint.read_weights(file, [checkpoint_key])[checkpoint_key], f"{checkpoint_key} of {file}"
        check_numbers(state, what)
        checkpoint.load_weights(encoder, state, what)
    return encoder
