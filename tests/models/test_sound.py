"""Spectrograms against transformers, and the encoder and fusion of sound."""

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram

from tubelet.grid import ClipShape
from tubelet.models import build_encoder
from tubelet.models.correlation import LagCorrelation
from tubelet.models.fusion import Fusion
from tubelet.models.sound import LogMel, SoundEncoder, mel_filters

RATE = 16_000


@pytest.mark.parametrize(("num_frequencies", "bands", "rate"), [(201, 64, 16_000), (257, 40, 44_100)])
def test_mel_filters_are_those_of_transformers(num_frequencies, bands, rate):
    expected = mel_filter_bank(num_frequencies, bands, 0.0, rate / 2, rate, norm=None, mel_scale="htk")
    np.testing.assert_allclose(mel_filters(num_frequencies, bands, rate), expected, atol=1e-6)


def test_spectrogram_is_that_of_transformers():
    sound = torch.randn(2, 1, 3200, generator=torch.Generator().manual_seed(0))
    log_mel = LogMel(RATE, window=400, hop=160, num_bands=64, mean=-1.0, std=2.0)
    ours = log_mel(sound)
    assert ours.shape == (2, 1, 20, 64)
    padded = np.pad(sound[1, 0].numpy(), 120)  # frame i in the middle of hop i
    theirs = spectrogram(
        padded,
        np.hanning(401)[:400],  # periodic
        frame_length=400,
        hop_length=160,
        power=2.0,
        center=False,
        mel_filters=mel_filter_bank(201, 64, 0.0, RATE / 2, RATE, norm=None, mel_scale="htk"),
        mel_floor=0.0,
    )
    np.testing.assert_allclose(ours[1, 0].T, (np.log(theirs + 1e-6) + 1) / 2, atol=1e-4)
    left, right = ours
    stereo = log_mel(sound.transpose(0, 1))[0]
    torch.testing.assert_close(stereo, torch.cat([(left + right) / 2, left - right]))


def test_a_tone_is_in_the_frames_of_its_time_and_the_band_of_its_frequency():
    sound = torch.zeros(1, 1, RATE)
    sound[0, 0, 4800:6400] = torch.sin(2 * torch.pi * 1000 * torch.arange(1600) / RATE)
    picture = LogMel(RATE, 400, 160, 64)(sound)[0, 0]
    assert picture.amax(1).topk(10).indices.sort().values.tolist() == list(range(30, 40))
    band = mel_filters(201, 64, RATE)[25].argmax()  # 25 * 40 Hz
    assert (picture[31:39].argmax(1) == band).all()


def sound_encoder(channels=2):
    shape = ClipShape(1, (80, 32), 16, 1)
    options = {"name": "vit_tiny", "embed_dim": 24, "depth": 1, "num_heads": 2, "in_chans": channels}
    encoder = build_encoder(options, shape)
    return SoundEncoder(LogMel(RATE, 400, 200, 32), encoder)


def test_tokens_of_sound_are_in_the_order_of_time():
    encoder = sound_encoder()
    encoder.encoder.blocks = torch.nn.ModuleList()  # each token of its patch only
    sound = torch.randn(1, 2, RATE)
    later = sound.clone()
    later[..., RATE * 3 // 5 + 200 : RATE * 4 // 5 - 200] = 0  # inside of slot 3 of 5
    with torch.no_grad():
        changed = (encoder(sound) != encoder(later)).any(-1)[0]
    assert changed.tolist() == [False] * 6 + [True] * 2 + [False] * 2


@pytest.mark.parametrize("modalities", [("video",), ("sound",), ("video", "sound")])
def test_fusion_uses_every_parameter_and_every_modality(modalities):
    torch.manual_seed(0)
    sizes = {"video": (8, 24), "sound": (10, 40)}
    times = {"video": torch.arange(4).repeat_interleave(2) / 4 + 0.125, "sound": torch.arange(10) / 10 + 0.05}
    fusion = Fusion(
        {m: sizes[m][1] for m in modalities}, {m: times[m] for m in modalities}, 32, num_heads=2, depth=2, num_outputs=5
    )
    tokens = {m: torch.randn(3, *sizes[m], requires_grad=True) for m in modalities}
    fusion(tokens).square().sum().backward()
    assert all(p.grad is not None for p in fusion.parameters())
    assert all((t.grad.abs().sum((0, 2)) > 0).all() for t in tokens.values())


def test_a_window_shorter_than_the_hop_is_refused():
    with pytest.raises(ValueError, match="a window of 100 samples does not cover the hop of 160"):
        LogMel(RATE, 100, 160, 32)


def test_correlations_over_the_lag_are_those_of_a_loop_and_tell_a_shift():
    torch.manual_seed(0)
    slots = {"video": torch.arange(8) / 8 + 1 / 16, "sound": torch.arange(10) / 10 + 0.05}
    times = {"video": slots["video"].repeat_interleave(2), "sound": slots["sound"]}
    model = LagCorrelation({"video": 12, "sound": 20}, times, 16, num_heads=4, max_lag=0.5, num_outputs=3)
    tokens = {"video": torch.randn(2, 16, 12), "sound": torch.randn(2, 10, 20)}
    video, sound = model._features("video", tokens["video"]), model._features("sound", tokens["sound"])
    assert video.shape == (2, 8, 4, 4)
    correlations = []
    for lag in range(-5, 6):
        pairs = [
            (video[:, t] * sound[:, u]).sum(-1) / 2
            for t in range(8)
            for u in range(10)
            if round(float(slots["video"][t] - slots["sound"][u]) * 10) == lag
        ]
        correlations.append(torch.stack(pairs).mean(0))
    torch.testing.assert_close(model(tokens), model.head(torch.stack(correlations, -1).flatten(1)))

    times = dict.fromkeys(("video", "sound"), slots["sound"])
    model = LagCorrelation({"video": 12, "sound": 12}, times, 12, num_heads=1, max_lag=0.3, num_outputs=7)
    model.inputs["sound"] = model.inputs["video"]
    model.head = torch.nn.Identity()
    signal = torch.randn(50, 13, 12)
    for lag in (-3, 0, 2):
        shifted = model({"video": signal[:, 3:], "sound": torch.roll(signal, -lag, 1)[:, 3:]})
        assert (shifted.argmax(1) == 3 + lag).float().mean() > 0.9
