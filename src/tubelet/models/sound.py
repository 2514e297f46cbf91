"""Sound as input of an encoder of images: the spectrogram is a picture whose first axis is time."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tubelet.config import Config
from tubelet.config.registry import PartOptions
from tubelet.grid import ClipShape, Grid, SoundShape
from tubelet.models import ENCODERS, build_encoder
from tubelet.models.interfaces import Encoder


class SpectrogramConfig(Config):
    """YAML section `spectrogram`: what the encoder of the sound sees. The defaults suit speech and events."""

    window: float = Field(0.025, gt=0)
    """Seconds of sound in a frame."""
    hop: float = Field(0.01, gt=0)
    """Seconds from one frame to the next. The patch size of the encoder times this is the duration of its tokens, which
    has to divide the duration of a clip."""
    num_bands: int = Field(64, ge=1)
    """Bands of the mel scale."""
    patch_size: int = Field(16, ge=1)
    """Frames and bands of a patch."""
    floor: float = Field(1e-6, gt=0)
    """Energy that is added to that of a band before the logarithm: what is much quieter, such as noise, is no longer
    seen. A tone of amplitude 1 has about (sample_rate * window / 4)^2."""
    mean: float = -5.0
    """Of the logarithm of the energy in a band, in the training data; for normalization."""
    std: float = Field(4.0, gt=0)
    """Standard deviation of the same, for normalization."""


class LogMel(nn.Module):
    """Logarithm of the energy in bands of the mel scale: [B, C, samples] -> [B, C, frames, bands].

    Of stereo sound, the channels of the result are the mean of both sides and their difference, the level difference
    that tells from where a sound comes. Otherwise it would be a small part of two nearly equal pictures.

    Frame i is computed from a Hann window around the middle of the samples i * hop to (i + 1) * hop - 1, so that frames
    divide the sound as patches divide a picture. Outside of the sound is silence.

    Args:
        sample_rate: Samples per second.
        window: Samples of the window, and of the Fourier transform.
        hop: Samples from one frame to the next.
        num_bands: Number of bands, from 0 to half of the sample rate.
        mean: Mean of the logarithm in the training data, which is subtracted.
        std: Standard deviation, by which it is divided.
        floor: Energy that is added to that of each band before the logarithm; makes equal what is quieter.
    """

    filters: Tensor
    window: Tensor

    def __init__(
        self,
        sample_rate: int,
        window: int,
        hop: int,
        num_bands: int,
        mean: float = 0.0,
        std: float = 1.0,
        floor: float = 1e-6,
    ):
        super().__init__()
        if window < hop:
            raise ValueError(f"a window of {window} samples does not cover the hop of {hop}")
        self.hop, self.num_bands = hop, num_bands
        self.mean, self.std, self.floor = mean, std, floor
        self.register_buffer("filters", mel_filters(window // 2 + 1, num_bands, sample_rate), persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    @torch.no_grad()
    def forward(self, sound: Tensor) -> Tensor:
        with torch.autocast(sound.device.type, enabled=False):
            length = len(self.window)
            before = (length - self.hop) // 2
            padded = F.pad(sound.float(), (before, length - self.hop - before)).flatten(0, 1)
            spectrum = torch.stft(padded, length, self.hop, window=self.window, center=False, return_complex=True)
            power = spectrum.real.square() + spectrum.imag.square()  # on a CPU four times as fast as abs().square()
            energy = torch.einsum("nft,fm->ntm", power, self.filters)
            logarithm = (energy + self.floor).log().unflatten(0, sound.shape[:2])
            normalized = (logarithm - self.mean) / self.std
            return mean_and_difference(normalized) if normalized.shape[1] == 2 else normalized


def mean_and_difference(sides: Tensor) -> Tensor:
    """Return the mean of two channels [B, 2, …] and their difference, left minus right."""
    left, right = sides.unbind(1)
    return torch.stack([(left + right) / 2, left - right], dim=1)


def mel_filters(num_frequencies: int, num_bands: int, sample_rate: int) -> Tensor:
    """Return triangular filters [num_frequencies, num_bands], equally wide on the mel scale (O'Shaughnessy 1987).

    Frequencies are from 0 to half of the sample rate; the peak of each filter is 1.
    """

    def to_mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    nyquist = sample_rate / 2
    mels = torch.linspace(0, to_mel(nyquist), num_bands + 2, dtype=torch.float64)
    edges = 700 * (10 ** (mels / 2595) - 1)
    frequencies = torch.linspace(0, nyquist, num_frequencies, dtype=torch.float64)[:, None]
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).float()


class SoundEncoder(nn.Module):
    """Encode sound [B, C, samples] to tokens [B, N, D], time slot by time slot.

    With indices [B, K] of the tokens to keep they are [B, K, D], with a list of such masks a list of these.

    Args:
        log_mel: Makes the spectrogram.
        encoder: Encoder of images [B, C, frames, bands], whose tokens are in row-major order.
    """

    built_from: dict[str, Any]
    """Options and size of the sound as JSON types; set by `build_sound_encoder`."""

    def __init__(self, log_mel: LogMel, encoder: Encoder):
        super().__init__()
        self.log_mel, self.encoder = log_mel, encoder
        self.accepts_masks = encoder.accepts_masks
        self.embed_dim, self.num_heads = encoder.embed_dim, encoder.num_heads

    def forward(self, sound: Tensor, masks: Tensor | list[Tensor] | None = None) -> Any:
        spectrogram = self.log_mel(sound)
        return self.encoder(spectrogram) if masks is None else self.encoder(spectrogram, masks)

    def grid_size(self, num_samples: int) -> Grid:
        """Return the token grid (1, time slots, bands) of sound.

        Raises:
            ValueError: The tokens do not divide the sound.
        """
        frames, rest = divmod(num_samples, self.log_mel.hop)
        if rest:
            raise ValueError(f"{num_samples} samples are not divisible by the hop of {self.log_mel.hop} samples")
        return self.encoder.grid_size(1, frames, self.log_mel.num_bands)


def build_sound_encoder(
    options: PartOptions | dict[str, Any], spectrogram: SpectrogramConfig, sound: SoundShape
) -> SoundEncoder:
    """Build an encoder of sound.

    Args:
        options: Value of an option of type `EncoderOptions`; its `in_chans` is set to the channels of the sound.
        spectrogram: What the encoder sees.
        sound: Size of the sound.

    Raises:
        ValueError: Options and sizes do not fit together. The message begins with the keys.
    """
    shape = spectrogram_shape(spectrogram, sound)
    raw = options if isinstance(options, dict) else options.model_dump(exclude_unset=True)
    s, rate = spectrogram, sound.sample_rate
    try:
        encoder = build_encoder(ENCODERS.parse({**raw, "in_chans": sound.channels}), shape)
        log_mel = LogMel(rate, round(s.window * rate), round(s.hop * rate), s.num_bands, s.mean, s.std, s.floor)
    except ValueError as error:
        raise ValueError(f"sound_encoder or spectrogram: {error}") from None
    built = SoundEncoder(log_mel, encoder)
    built.built_from = {
        "sound_encoder": encoder.built_from["encoder"],
        "spectrogram": spectrogram.model_dump(),
        "sound": sound.as_dict(),
    }
    return built


def spectrogram_shape(spectrogram: SpectrogramConfig, sound: SoundShape) -> ClipShape:
    """Return the size of the spectrogram as a picture of one frame.

    Raises:
        ValueError: Hop or tokens are not whole numbers of samples or of tokens. The message begins with the key.
    """
    s = spectrogram
    hop, tokens = s.hop * sound.sample_rate, sound.seconds / s.hop / s.patch_size
    if abs(hop - round(hop)) > 1e-6 or abs(tokens - round(tokens)) > 1e-6:
        nearest = max(1, round(tokens))
        raise ValueError(
            f"spectrogram.hop: {s.hop:g} seconds are {hop:g} samples, and {s.patch_size} frames are a token, of which "
            f"a clip of {sound.seconds:g} seconds has {tokens:g}; both have to be whole numbers. With {nearest} "
            f"tokens, hop is {sound.seconds / s.patch_size / nearest:g}"
        )
    return ClipShape(1, (round(tokens) * s.patch_size, s.num_bands), s.patch_size, 1)
