"""The model: encoders of the modalities, and what reads their tokens."""

from typing import Any

import torch
from torch import Tensor

from app.audio.options import Options
from tubelet import hub
from tubelet.config import ConfigError
from tubelet.data.sounding_videos import seconds_of_clip
from tubelet.grid import SoundShape
from tubelet.models.correlation import LagCorrelation
from tubelet.models.fusion import Fusion
from tubelet.models.interfaces import Encoder
from tubelet.models.sound import SoundEncoder, build_sound_encoder
from tubelet.objectives.audio_visual import AudioVisual, Synchronisation, VideoSoundAlignment, largest
from tubelet.probing.fine_tuning import initial_encoder
from tubelet.runtime.seeds import seed_for

Model = AudioVisual | VideoSoundAlignment


def build_model(options: Options) -> Model:
    """Build the model of the task with its initial weights, a function of the seed.

    Raises:
        ConfigError: An encoder does not fit the clips or their sound.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(options.meta.seed, "audio"))
        encoder = initial_encoder(options) if "video" in options.modalities else None
        sound_encoder = initial_sound_encoder(options) if "sound" in options.modalities else None
        return _build(options, encoder, sound_encoder)


def _build(options: Options, encoder: Encoder | None, sound_encoder: SoundEncoder | None) -> Model:
    data, frozen = options.data, not options.train_encoder
    common: dict[str, Any] = {
        "mean": data.normalize_mean,
        "std": data.normalize_std,
        "frozen": frozen and options.pretrain is not None,
        "frozen_sound": frozen and options.sound_pretrain is not None,
        "encoder_layer_decay": options.optimization.layer_decay,
    }
    widths, times = token_times(options, encoder, sound_encoder)
    f, shifts = options.fusion, options.synchronisation.shifts()

    def fusion(modalities: list[str], num_outputs: int) -> Fusion:
        return Fusion(
            {name: widths[name] for name in modalities},
            {name: times[name] for name in modalities},
            f.embed_dim,
            f.num_heads,
            f.depth,
            num_outputs,
        )

    try:
        if options.task == "retrieval":
            assert encoder is not None
            assert sound_encoder is not None
            o = options.alignment
            heads = [fusion([name], o.embed_dim) for name in widths]
            return VideoSoundAlignment(encoder, sound_encoder, *heads, temperature=o.temperature, **common)
        if options.task == "classification":
            assert data.num_classes is not None
            return AudioVisual(encoder, sound_encoder, fusion(list(widths), data.num_classes), **common)
        reader: Fusion | LagCorrelation
        if len(widths) > 1:
            max_lag = largest(shifts) + options.synchronisation.resolution
            reader = LagCorrelation(widths, times, f.embed_dim, f.num_heads, max_lag, len(shifts))
        else:
            reader = fusion(list(widths), len(shifts))
    except ValueError as error:
        raise ConfigError(f"fusion: {error}") from None
    rate = options.sound.sample_rate
    return Synchronisation(encoder, sound_encoder, reader, shifts=shifts, sample_rate=rate, **common)


def initial_sound_encoder(options: Options) -> SoundEncoder:
    """Load the encoder of the sound that `sound_pretrain` names, or build that of `sound_encoder`.

    Raises:
        ConfigError: It does not fit the sound.
    """
    pretrain, sound = options.sound_pretrain, sound_shape(options)
    if pretrain is None:
        try:
            return build_sound_encoder(options.sound_encoder, options.spectrogram, sound)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    folder, weights = pretrain.folder, not pretrain.random
    path = folder if pretrain.checkpoint is None or pretrain.random else f"{folder}/{pretrain.checkpoint}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(pretrain.init_seed, "random encoder"))
        encoder = hub.load_sound_encoder(path, pretrain.checkpoint_key, weights=weights)
    for name in ("sample_rate", "channels"):
        trained = encoder.built_from["sound"][name]
        if trained != getattr(options.sound, name):
            raise ConfigError(
                f"sound.{name}: {getattr(options.sound, name)}, but the encoder of {path} was trained with {trained}; "
                f"set it to {trained}"
            )
    return encoder


def token_times(
    options: Options, encoder: Encoder | None, sound_encoder: SoundEncoder | None
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the width of each modality's tokens, and the time of each token.

    Raises:
        ConfigError: The tokens do not divide the clip or its sound.
    """
    sound, side = sound_shape(options), options.optimization.resolution
    widths: dict[str, int] = {}
    times: dict[str, Tensor] = {}
    if encoder is not None:
        grid = encoder.grid_size(options.data.frames_per_clip, side, side)
        widths["video"] = encoder.embed_dim
        times["video"] = slot_times(grid.t, grid.tokens_per_frame, sound.seconds)
    if sound_encoder is not None:
        try:
            grid = sound_encoder.grid_size(sound.num_samples)
        except ValueError as error:
            raise ConfigError(f"data.clip_duration or data.fps, and sound_pretrain: {error}") from None
        widths["sound"] = sound_encoder.embed_dim
        times["sound"] = slot_times(grid.h, grid.w, sound.seconds)
    return widths, times


def slot_times(num_slots: int, tokens_per_slot: int, seconds: float) -> Tensor:
    """Return the time in the middle of each token's slot [num_slots * tokens_per_slot], in seconds."""
    return ((torch.arange(num_slots) + 0.5) * (seconds / num_slots)).repeat_interleave(tokens_per_slot)


def sound_shape(options: Options) -> SoundShape:
    """Return the size of the sound of a clip."""
    data, sound = options.data, options.sound
    seconds = seconds_of_clip(data.frames_per_clip, data.clip_duration, data.fps)
    return SoundShape(round(seconds * sound.sample_rate), sound.sample_rate, sound.channels)
