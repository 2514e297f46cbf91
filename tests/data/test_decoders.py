import functools
import io

import av
import numpy as np
import pytest
import torch

from tubelet.config import ConfigError
from tubelet.data import Decoder, VideoError
from tubelet.data.decoders import DECODERS, check_decoder, open_video, read_frames
from tubelet.data.frame_cache import CachedVideo


@functools.cache
def why_missing(name):
    try:
        check_decoder(Decoder(name=name))
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture(params=DECODERS)
def decoder(request):
    if reason := why_missing(request.param):
        pytest.skip(reason)
    return request.param


KINDS = {
    "h264 with B frames": {"frames": 40, "options": {"crf": "12", "g": "15", "bf": "3"}},
    "h264 at 29.97": {"frames": 40, "rate": 30},
    "odd sizes": {"codec": "libvpx-vp9", "height": 65, "width": 77, "options": {"crf": "10", "cpu-used": "8"}},
    "10 bit": {"codec": "libx265", "pix_fmt": "yuv420p10le", "options": {"x265-params": "log-level=none"}},
    "mpeg4": {"codec": "mpeg4", "options": {"qscale": "2"}},
    "padded rows": {"width": 144},  # decord rejects this width
    "one frame": {"frames": 1},
}


SLOW = dict.fromkeys(["h264 at 29.97", "odd sizes", "10 bit"], pytest.mark.slow)


def all_frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW.get(kind, ())) for kind in KINDS])
def test_requested_frames_are_the_frames_of_the_file(decoder, kind, make_video, tmp_path):
    suffix = ".webm" if "vp9" in KINDS[kind].get("codec", "") else ".mp4"
    path = make_video(tmp_path / f"v{suffix}", **KINDS[kind])
    everything = all_frames(path)
    video = open_video(path, decoder)
    assert video.num_frames == len(everything)
    assert video.fps == pytest.approx(30)
    np.testing.assert_allclose(video.times, np.arange(len(everything)) / 30)
    rng = np.random.default_rng(0)
    choices = [np.arange(len(everything)), np.sort(rng.integers(0, len(everything), 7)), np.array([0, 0])]
    choices.append(rng.permutation(len(everything))[:9])  # overlapping clips: in any order, also without repeats
    for indices in choices:
        frames = read_frames(video, indices, path)
        assert frames.dtype == np.uint8
        assert frames.shape == (len(indices), *everything.shape[1:])
        distances = np.abs(frames[:, None, ::5, ::5].astype(int) - everything[None, :, ::5, ::5]).mean((2, 3, 4))
        np.testing.assert_array_equal(distances.argmin(1), indices)
        # libraries round colors differently, most of all in 10-bit files
        assert np.abs(frames.astype(int) - everything[indices]).mean() < (4 if kind == "10 bit" else 1)


@pytest.mark.parametrize("kind", ["h264 with B frames", "padded rows", "mpeg4 in avi"])
def test_file_like_objects_give_the_frames_of_the_path(decoder, kind, make_video, tmp_path):
    options = {"codec": "mpeg4", "options": {"qscale": "2"}} if kind == "mpeg4 in avi" else KINDS[kind]
    path = make_video(tmp_path / ("v.avi" if kind == "mpeg4 in avi" else "v.mp4"), **options)
    indices = np.array([0, 3, 17, 17, 29])
    expected = read_frames(open_video(path, decoder), indices, path)
    content = io.BytesIO((tmp_path / path).read_bytes())
    content.seek(100)  # it is read from its beginning
    with open(path, "rb") as file:
        for source in (content, file):
            first, second = open_video(source, decoder), open_video(source, decoder)
            assert (first.num_frames, first.fps) == (30 if options.get("frames") is None else options["frames"], 30)
            for _ in range(2):  # two videos of the same object do not disturb each other
                for video in (first, second):
                    np.testing.assert_array_equal(read_frames(video, indices, path), expected)


@pytest.mark.skipif(why_missing("torchcodec") is not None, reason=str(why_missing("torchcodec")))
def test_approximate_seeking_gives_the_frames_of_a_constant_rate(make_video, tmp_path):
    path = make_video(tmp_path / "v.mp4", **KINDS["h264 with B frames"])
    indices = np.array([0, 3, 17, 29, 39])
    exact, approximate = (
        open_video(path, Decoder(name="torchcodec", seek_mode=mode)) for mode in ("exact", "approximate")
    )
    np.testing.assert_array_equal(approximate.frames_at(indices), exact.frames_at(indices))
    np.testing.assert_allclose(approximate.times, exact.times)


def test_a_decoder_that_does_not_work_here_is_an_error_before_any_video_is_read(videos, monkeypatch):
    check_decoder(Decoder())
    if why_missing("torchcodec"):
        with pytest.raises(ConfigError, match="data.decoder: torchcodec: .*set data.decoder to pyav"):
            check_decoder(Decoder(name="torchcodec"))
    else:
        check_decoder(Decoder(name="torchcodec"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="data.decoder.device: cuda: torch finds no GPU; set it to cpu"):
            check_decoder(Decoder(name="torchcodec", device="cuda"))
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "in a worker")
    with pytest.raises(ConfigError, match="a worker process cannot use the GPU; set num_workers: 0"):
        open_video(str(videos / "a.mp4"), Decoder(name="torchcodec", device="cuda"))


def test_errors_name_a_file_like_object(decoder, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with open(tmp_path / "text.mp4", "rb") as file, pytest.raises(VideoError, match=r"text.mp4: \w+ cannot open it"):
        open_video(file, decoder)
    with pytest.raises(VideoError, match=r"\(file-like object\): \w+ cannot open it"):
        open_video(io.BytesIO(b"not a video"), decoder)


def test_time_stamps_that_do_not_start_at_zero(decoder, make_video, tmp_path, numbers_of):
    source = make_video(tmp_path / "v.mp4", frames=20)
    late = str(tmp_path / "late.mkv")
    with av.open(source) as reader, av.open(late, "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(video=0):
            if packet.size:
                packet.pts += 90_000
                packet.dts += 90_000
                packet.stream = stream
                writer.mux(packet)
    video = open_video(late, decoder)
    assert video.num_frames == 20
    np.testing.assert_array_equal(numbers_of(read_frames(video, np.array([3, 4, 17]), late)), [3, 4, 17])


def test_the_rotation_of_a_file_is_applied(decoder, make_video, tmp_path):
    path = make_video(tmp_path / "v.mp4", frames=4)
    upright = all_frames(path)
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    # The track header's matrix (nine 32-bit numbers, 40 bytes into the box's content) for a quarter turn clockwise.
    start = content.index(b"tkhd") + 4 + 40
    quarter = [0, 0x10000, 0, -0x10000, 0, 0, 0, 0, 0x40000000]
    content[start : start + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in quarter)
    rotated = tmp_path / "rotated.mp4"
    rotated.write_bytes(content)
    frames = read_frames(open_video(str(rotated), decoder), np.arange(4), str(rotated))
    np.testing.assert_array_equal(frames, np.rot90(upright, k=-1, axes=(1, 2)))
    cached = CachedVideo(str(rotated), decoder, str(tmp_path / "cache"))
    np.testing.assert_array_equal(read_frames(cached, np.arange(4), str(rotated)), frames)


def test_files_that_cannot_be_decoded_are_a_video_error(decoder, broken_video, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("empty.mp4", "text.mp4", "gone.mp4"):
        with pytest.raises(VideoError, match=name):
            open_video(str(tmp_path / name), decoder)
    with pytest.raises(VideoError, match="broken.mp4: .*cannot decode frames 0..9"):
        read_frames(open_video(broken_video, decoder), np.arange(10), broken_video)


def test_cached_frames_are_the_decoded_ones_and_follow_the_file(make_video, tmp_path):
    path, folder = make_video(tmp_path / "v.mp4", frames=12), str(tmp_path / "cache")
    indices = np.array([0, 3, 3, 11])
    expected = read_frames(open_video(path, "decord"), indices, path)
    for _ in range(2):  # filling, then reading
        video = CachedVideo(path, "decord", folder)
        assert (video.num_frames, video.fps) == (12, 30)
        np.testing.assert_array_equal(video.times, np.arange(12) / 30)
        np.testing.assert_array_equal(read_frames(video, indices, path), expected)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    make_video(tmp_path / "v.mp4", frames=15)
    assert CachedVideo(path, "decord", folder).num_frames == 15
