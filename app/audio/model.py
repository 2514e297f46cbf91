"""The model: encoders of the modalities, and their fusion."""

import torch
from torch import Tensor

from app.audio.options import Options
from tubelet.config import ConfigError
from tubelet.data.sounding_videos import seconds_of_clip
from tubelet.grid import ClipShape
from tubelet.models import ENCODERS, build_encoder
from tubelet.models.correlation import LagCorrelation
from tubelet.models.fusion import Fusion
from tubelet.models.interfaces import Encoder
from tubelet.models.sound import LogMel, SoundEncoder
from tubelet.objectives.audio_visual import AudioVisual, Synchronisation, largest
from tubelet.probing.fine_tuning import initial_encoder
from tubelet.runtime.seeds import seed_for


def build_model(options: Options) -> AudioVisual:
    """Build the model of the task with its initial weights, a function of the seed.

    Raises:
        ConfigError: An encoder does not fit the clips or their sound.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(options.meta.seed, "audio"))
        encoder = initial_encoder(options) if "video" in options.modalities else None
        sound_encoder = build_sound_encoder(options) if "sound" in options.modalities else None
        fusion = build_fusion(options, encoder, sound_encoder)
    data, o = options.data, options.optimization
    common = {
        "mean": data.normalize_mean,
        "std": data.normalize_std,
        "frozen": not options.train_encoder,
        "encoder_layer_decay": o.layer_decay,
    }
    if options.task == "classification":
        return AudioVisual(encoder, sound_encoder, fusion, **common)
    shifts, rate = options.synchronisation.shifts(), options.sound.sample_rate
    return Synchronisation(encoder, sound_encoder, fusion, shifts=shifts, sample_rate=rate, **common)


def build_sound_encoder(options: Options) -> SoundEncoder:
    """Build the encoder of the sound. Raises ConfigError where its patches do not divide the spectrogram."""
    s, rate, seconds = options.spectrogram, options.sound.sample_rate, clip_seconds(options)
    hop, frames = s.hop * rate, seconds / s.hop
    tokens = frames / s.patch_size
    if abs(hop - round(hop)) > 1e-6 or abs(tokens - round(tokens)) > 1e-6:
        nearest = max(1, round(tokens))
        raise ConfigError(
            f"spectrogram.hop: {s.hop:g} seconds are {hop:g} samples, and {s.patch_size} frames are a token, of which "
            f"a clip of {seconds:g} seconds has {tokens:g}; both have to be whole numbers. With {nearest} tokens, hop "
            f"is {seconds / s.patch_size / nearest:g}"
        )
    shape = ClipShape(1, (round(frames), s.num_bands), s.patch_size, 1)
    given = options.sound_encoder.model_dump(exclude_unset=True) | {"in_chans": options.sound.channels}
    try:
        encoder = build_encoder(ENCODERS.parse(given), shape)
        log_mel = LogMel(rate, round(s.window * rate), round(hop), s.num_bands, s.mean, s.std, s.floor)
        return SoundEncoder(log_mel, encoder, encoder.grid_size(1, shape.height, shape.width))
    except ValueError as error:
        raise ConfigError(f"sound_encoder or spectrogram: {error}") from None


def build_fusion(
    options: Options, encoder: Encoder | None, sound_encoder: SoundEncoder | None
) -> Fusion | LagCorrelation:
    """Build what reads the tokens of the encoders."""
    seconds, side = clip_seconds(options), options.optimization.resolution
    widths: dict[str, int] = {}
    times: dict[str, Tensor] = {}
    if encoder is not None:
        grid = encoder.grid_size(options.data.frames_per_clip, side, side)
        widths["video"], times["video"] = encoder.embed_dim, slot_times(grid.t, grid.tokens_per_frame, seconds)
    if sound_encoder is not None:
        grid = sound_encoder.grid
        widths["sound"], times["sound"] = sound_encoder.embed_dim, slot_times(grid.h, grid.w, seconds)
    f, shifts = options.fusion, options.synchronisation.shifts()
    try:
        if options.task == "synchronisation" and len(widths) > 1:
            max_lag = largest(shifts) + options.synchronisation.resolution
            return LagCorrelation(widths, times, f.embed_dim, f.num_heads, max_lag, len(shifts))
        num_outputs = options.data.num_classes if options.task == "classification" else len(shifts)
        return Fusion(widths, times, f.embed_dim, f.num_heads, f.depth, num_outputs)
    except ValueError as error:
        raise ConfigError(f"fusion: {error}") from None


def slot_times(num_slots: int, tokens_per_slot: int, seconds: float) -> Tensor:
    """Return the time in the middle of each token's slot [num_slots * tokens_per_slot], in seconds."""
    return ((torch.arange(num_slots) + 0.5) * (seconds / num_slots)).repeat_interleave(tokens_per_slot)


def clip_seconds(options: Options) -> float:
    """Return the duration of a clip."""
    return seconds_of_clip(options.data.frames_per_clip, options.data.clip_duration, options.data.fps)
