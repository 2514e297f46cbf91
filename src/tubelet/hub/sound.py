"""The encoder of the sound of a run."""

from pathlib import Path

from tubelet.grid import SoundShape
from tubelet.hub.state import check_numbers
from tubelet.models.sound import SoundEncoder, SpectrogramConfig, build_sound_encoder
from tubelet.runtime import checkpoint
from tubelet.runtime.checkpoint import CheckpointError


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
