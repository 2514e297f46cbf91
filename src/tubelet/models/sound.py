"""Sound as input of an encoder of images: the spectrogram is a picture whose first axis is time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.grid import Grid
from tubelet.models.interfaces import Encoder


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
        self.hop, self.mean, self.std, self.floor = hop, mean, std, floor
        self.register_buffer("filters", mel_filters(window // 2 + 1, num_bands, sample_rate), persistent=False)
        self.register_buffer("window", torch.hann_window(window), persistent=False)

    @torch.no_grad()
    def forward(self, sound: Tensor) -> Tensor:
        with torch.autocast(sound.device.type, enabled=False):
            length = len(self.window)
            before = (length - self.hop) // 2
            padded = F.pad(sound.float(), (before, length - self.hop - before)).flatten(0, 1)
            spectrum = torch.stft(padded, length, self.hop, window=self.window, center=False, return_complex=True)
            energy = torch.einsum("nft,fm->ntm", spectrum.abs().square(), self.filters)
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

    Args:
        log_mel: Makes the spectrogram.
        encoder: Encoder of images [B, C, frames, bands], whose tokens are in row-major order.
        grid: Its token grid (1, time slots, bands).
    """

    def __init__(self, log_mel: LogMel, encoder: Encoder, grid: Grid):
        super().__init__()
        self.log_mel, self.encoder, self.grid = log_mel, encoder, grid
        self.embed_dim, self.num_heads = encoder.embed_dim, encoder.num_heads

    def forward(self, sound: Tensor) -> Tensor:
        return self.encoder(self.log_mel(sound))
