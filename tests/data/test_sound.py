"""Sound of a span of a file, against decoding all of it, and against clicks and flashes at known times."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from tubelet.data import DataConfig, Draw, storage
from tubelet.data.frame_cache import cached_sound
from tubelet.data.loader import make_eval_loader
from tubelet.data.resampling import resample, span_needed
from tubelet.data.sound import SoundError, Span, read_sound
from tubelet.data.sounding_videos import Dataset, FormatOptions
from tubelet.data.transforms import EvalTransform

RATE = 16_000
FPS = 8
KINDS = {  # suffix, audio codec, sample format, rate, options of the muxer
    "aac in mp4": (".mp4", "aac", "fltp", 16_000, {}),
    "aac of 44.1 kHz in mp4": (".mp4", "aac", "fltp", 44_100, {}),
    "fragmented mp4": (".mp4", "aac", "fltp", 48_000, {"movflags": "frag_keyframe+empty_moov"}),
    "opus in matroska": (".mkv", "libopus", "flt", 48_000, {}),
    "pcm in avi": (".avi", "pcm_s16le", "s16", 16_000, {}),
    "aac in mpeg-ts": (".ts", "aac", "fltp", 48_000, {}),
    "pcm in mov": (".mov", "pcm_s16le", "s16", 22_050, {}),
}


def write(path, sound, rate, *, codec="aac", format="fltp", frames=None, delay=0.0, options=None):
    """Write sound [channels, samples], `delay` seconds after the first of the gray or given frames."""
    seconds = sound.shape[1] / rate + delay
    frames = np.full((round(seconds * FPS), 32, 32, 3), 90, np.uint8) if frames is None else frames
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(sound)]
    with av.open(str(path), "w", options=options or {}) as container:
        video = container.add_stream("libx264", rate=FPS)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        audio = container.add_stream(codec, rate=rate, layout=layout)
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        planar = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound, np.float32), format="fltp", layout=layout)
        planar.sample_rate, planar.time_base = rate, Fraction(1, rate)
        convert = av.AudioResampler(format=format, layout=layout, rate=rate)
        for part in convert.resample(planar):
            part.pts, part.time_base = round(delay * rate), Fraction(1, rate)
            container.mux(audio.encode(part))
        container.mux(audio.encode(None))


def tones(seconds, rate, seed=0, channels=2):
    """Many tones below 3 kHz, whose sum shows every shift. AAC replaces noise by other noise, but keeps tones."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    waves = [
        np.sin(2 * np.pi * (rng.uniform(100, 3000) * time + rng.uniform())) for _ in range(12) for _ in range(channels)
    ]
    return (0.06 * np.sum(np.split(np.stack(waves), 12), axis=0)).astype(np.float32)


def delay_of(sound, reference):
    """Samples by which `sound` is later than `reference`, from the maximum of their correlation."""
    product = np.fft.rfft(sound, 2 * len(sound)) * np.fft.rfft(reference, 2 * len(sound)).conj()
    lag = int(np.fft.irfft(product).argmax())
    return lag if lag < len(sound) else lag - 2 * len(sound)


@pytest.mark.parametrize("kind", KINDS)
def test_a_span_is_that_part_of_the_whole_sound(kind, tmp_path):
    suffix, codec, format, rate, options = KINDS[kind]
    path = tmp_path / f"sound{suffix}"
    sound = tones(6, rate)
    write(path, sound, rate, codec=codec, format=format, options=options)
    whole = read_sound(str(path), Span(0.0, 6 * RATE, RATE), 2)
    original = read_sound_of(sound, rate)
    assert abs(delay_of(whole[0], original[0])) <= (16 if suffix in (".mkv", ".avi", ".ts") else 1)
    # A container that rounds time stamps leaves open where between two of them a span begins.
    shift = 1 if suffix in (".mkv", ".avi", ".ts") else 0
    for start in (0.3, 1.0, 2.71828, 4.9):
        first = round(start * RATE)
        part = read_sound(str(path), Span(start, RATE, RATE), 2)
        differences = [
            np.abs(part - whole[:, first + s : first + s + RATE]).max() for s in range(-16 * shift, 16 * shift + 1)
        ]
        assert min(differences) < (2e-3 if shift else 5e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_track_is_decoded_once_and_has_the_sound_of_the_file(kind, tmp_path, monkeypatch):
    suffix, codec, format, rate, options = KINDS[kind]
    path = tmp_path / f"sound{suffix}"
    write(path, tones(3, rate), rate, codec=codec, format=format, options=options)
    whole = read_sound(str(path), Span(-0.5, 4 * RATE, RATE), 2)
    status = storage.status(str(path), storage.DEFAULT_STORAGE)
    for _ in range(2):
        track = cached_sound(str(path), 2, str(tmp_path / "cache"), str(path), status)
        np.testing.assert_array_equal(track.read(Span(-0.5, 4 * RATE, RATE)), whole)
        part = track.read(Span(1.25, RATE, RATE))
        np.testing.assert_allclose(part, whole[:, round(1.75 * RATE) : round(2.75 * RATE)], atol=1e-5)
        monkeypatch.setattr(av, "open", None)
    with pytest.raises(SoundError, match=rf"sound{suffix}: no sound from 9 to 10 seconds"):
        track.read(Span(9.0, RATE, RATE))


def read_sound_of(sound, rate):
    begin, end = span_needed(0, 6 * RATE, rate, RATE)
    padded = np.pad(sound, ((0, 0), (-begin, max(0, end - sound.shape[1])))) if rate != RATE else sound
    return resample(padded[:, : end - begin], 0, 6 * RATE, rate, RATE)


@pytest.mark.parametrize(("rate_in", "rate_out"), [(44_100, 16_000), (48_000, 16_000), (8000, 22_050)])
def test_resampling_keeps_tones_and_removes_those_above_the_new_limit(rate_in, rate_out):
    first, length = 12_345, 2000

    def tone(hertz):
        begin, end = span_needed(first, length, rate_in, rate_out)
        x = np.sin(2 * np.pi * hertz * np.arange(begin, end) / rate_in)[None].astype(np.float32)
        y = resample(x, first, length, rate_in, rate_out)[0]
        return y, np.sin(2 * np.pi * hertz * np.arange(first, first + length) / rate_out)

    for hertz in (50, 1000, 3000):
        np.testing.assert_allclose(*tone(hertz), atol=2e-3)
    if rate_in > rate_out:
        assert np.abs(tone(0.6 * rate_out)[0]).max() < 1e-3


def test_what_is_outside_of_the_track_is_silence_and_no_sound_at_all_an_error(tmp_path):
    path = str(tmp_path / "late.mkv")
    sound = np.full((1, 2 * RATE), 0.5, np.float32)
    write(path, sound, RATE, codec="pcm_s16le", format="s16", delay=1.0)
    read = read_sound(path, Span(-0.5, 5 * RATE, RATE))[0]
    heard = np.zeros(5 * RATE)
    heard[round(1.5 * RATE) : round(3.5 * RATE)] = 0.5
    np.testing.assert_allclose(read, heard, atol=1e-3)
    with pytest.raises(SoundError, match=r"late.mkv: no sound from 0 to 0.5 seconds of its track"):
        read_sound(path, Span(0.0, RATE // 2, RATE))


@pytest.mark.parametrize(("given", "wanted"), [(1, 2), (2, 1), (2, 2), (6, 2)])
def test_channels_are_mixed(given, wanted, tmp_path):
    path = str(tmp_path / "channels.mkv")
    levels = np.linspace(0.1, 0.6, given, dtype=np.float32)
    write(path, np.repeat(levels[:, None], RATE, 1), RATE, codec="pcm_s16le", format="s16")
    read = read_sound(path, Span(0.25, RATE // 2, RATE), wanted)
    assert read.shape == (wanted, RATE // 2)
    if given == 2:
        expected = levels if wanted == 2 else [levels.mean()]
        np.testing.assert_allclose(read.mean(1), expected, atol=1e-3)


def test_files_without_usable_sound_say_so(tmp_path):
    silent, broken = tmp_path / "silent.mp4", tmp_path / "broken.mp4"
    write(silent, tones(1, RATE), RATE)
    with av.open(str(silent)) as source, av.open(str(tmp_path / "pictures.mp4"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    with pytest.raises(SoundError, match="no sound track"):
        read_sound(str(tmp_path / "pictures.mp4"), Span(0.0, 100, RATE))
    broken.write_bytes(b"no video")
    with pytest.raises(SoundError, match="cannot decode its sound"):
        read_sound(str(broken), Span(0.0, 100, RATE))


CLICKS = (0.5, 1.375, 2.5)
"""Seconds, at which a frame begins."""


@pytest.fixture(scope="module")
def flashes(tmp_path_factory):
    """Videos of 4 seconds, of which a frame is white whenever a click is heard, in several containers."""
    folder = tmp_path_factory.mktemp("flashes")
    sound = np.zeros((2, 4 * 48_000), np.float32)
    frames = np.full((4 * FPS, 32, 32, 3), 40, np.uint8)
    for second in CLICKS:
        start = round(second * 48_000)
        sound[:, start : start + 480] = 0.8 * np.sin(2 * np.pi * 1000 * np.arange(480) / 48_000)
        frames[round(second * FPS)] = 255
    for name, codec in (("a.mp4", "aac"), ("b.mkv", "libopus"), ("c.ts", "aac")):
        format = "flt" if codec == "libopus" else "fltp"
        write(folder / name, sound, 48_000, codec=codec, format=format, frames=frames)
    return folder


def sounding(folder, **kwargs):
    data = DataConfig(
        datasets=[str(folder)],
        format=kwargs.pop("format", FormatOptions(channels=2)),
        num_frames=8,
        clip_duration=1.0,
        crop_size=32,
        tubelet_size=1,
        num_workers=0,
        cache=kwargs.pop("cache", None),
    )
    return Dataset(data, EvalTransform(32), seed=3, **kwargs)


def test_clicks_are_heard_when_flashes_are_seen(flashes):
    videos = sounding(flashes)
    seen = 0
    for index in range(3):
        for epoch in range(8):
            sample = videos[Draw(0, epoch, index, 0)]
            bright = sample.clips[0].float().mean((0, 2, 3)) > 200
            loud = sample.views["sound"][0].abs().amax(0) > 0.2
            onsets = [i / 8 for i in np.flatnonzero(bright)]
            assert sample.views["sound"].shape == (1, 2, RATE)
            for onset in onsets:
                at = round(onset * RATE)
                assert loud[max(0, at - 32) : at + 160].any()
                assert not loud[max(0, at - 1600) : max(0, at - 200)].any()
            heard = np.flatnonzero(np.diff(np.flatnonzero(loud), prepend=-(10**6)) > 1000)
            assert len(heard) == len(onsets)
            seen += len(onsets)
    assert seen > 12


def test_margins_are_sound_around_the_clip_and_inside_of_the_file(flashes):
    plain, wide = sounding(flashes), sounding(flashes, margin=0.75)
    for epoch in range(12):
        sample = wide[Draw(0, epoch, 0, 0)]
        first = int(sample.frames[0, 0])
        assert sample.views["sound"].shape == (1, 2, round(2.5 * RATE))
        start = plain.read_sound(plain.paths[0], 0.75 + first / FPS - 0.75)
        np.testing.assert_allclose(sample.views["sound"][0, :, :RATE], start, atol=1e-4)
        assert 0 <= first <= 4 * FPS - 12 - 8
    with pytest.raises(Exception, match="4.00 seconds, fewer than the 4.20 of a clip with its margins"):
        sounding(flashes, margin=1.6)[Draw(0, 0, 0, 0)]


def test_a_part_of_a_video_has_its_part_of_the_sound(flashes, tmp_path):
    (tmp_path / "list.csv").write_text(f"path,start,end,label\n{flashes / 'a.mp4'},1.25,2.5,0\n")
    sample = sounding(tmp_path / "list.csv")[Draw(0, 0, 0, 0)]
    first = 1.25 + int(sample.frames[0, 0]) / FPS
    loud = np.flatnonzero(sample.views["sound"][0].abs().amax(0) > 0.2)[0] / RATE
    assert first + loud == pytest.approx(1.375, abs=0.003)


def test_samples_are_the_same_with_a_cache(flashes, tmp_path):
    plain, cached = sounding(flashes), sounding(flashes, cache=str(tmp_path))
    for draw in [Draw(0, epoch, index, 0) for epoch in range(2) for index in range(3)]:
        expected, found = plain[draw], cached[draw]
        assert expected.path == found.path
        assert torch.equal(expected.views["clip"], found.views["clip"])
        # Matroska rounds time stamps to a millisecond: what is decoded from the middle may be shifted by less.
        if not found.path.endswith(".mkv"):
            torch.testing.assert_close(found.views["sound"], expected.views["sound"], atol=1e-4, rtol=0)
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("missing", ["silence", "exclude"])
def test_files_without_sound_are_never_dropped_silently(missing, flashes, tmp_path):
    with av.open(str(flashes / "a.mp4")) as source, av.open(str(tmp_path / "mute.mp4"), "w") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    (tmp_path / "list.csv").write_text(f'"{tmp_path / "mute.mp4"}" 0\n"{flashes / "a.mp4"}" 1\n')
    videos = sounding(tmp_path / "list.csv", format=FormatOptions(missing=missing), on_error="exclude")
    (batch,) = make_eval_loader(videos, batch_size=2)
    ((path, reason, filtered),) = [(bad.path, bad.reason, bad.filtered) for bad in batch.bad]
    assert path.endswith("mute.mp4")
    if missing == "silence":
        assert (reason, filtered) == ("no sound track; silence in its place", True)
        assert batch.labels.tolist() == [0, 1]
        assert (batch.views["sound"][0] == 0).all()
        assert batch.views["sound"][1].abs().max() > 0.2
    else:
        assert (reason, filtered, batch.labels.tolist()) == ("no sound track", False, [1])
