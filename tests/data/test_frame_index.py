"""The index of files of many kinds, and the frames found by it, against reading and decoding the whole file."""

import functools
import gc
import io
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from tubelet.data import VideoError
from tubelet.data.decoders import frame_index, open_video, read_frames
from tubelet.data.decoders.frame_index import FrameIndex, IndexCache, scan
from tubelet.data.decoders.mp4 import read_movie
from tubelet.data.decoders.pictures import upright
from tubelet.data.decoders.pyav import PyavVideo

FRAMES = 60
GOP = {"g": "15", "crf": "12"}
VP8 = {"crf": "4", "b": "4M", "deadline": "realtime", "cpu-used": "8"}
X265 = "log-level=none:keyint=15:min-keyint=15:bframes=3"


@pytest.fixture(autouse=True)
def no_cached_indices():
    frame_index.INDICES.clear()


@pytest.fixture(scope="session")
def h264(make_video, tmp_path_factory):
    """60 frames with B frames and key frames at 0, 15, 30 and 45."""
    return make_video(tmp_path_factory.mktemp("source") / "h264.mp4", frames=FRAMES, options={**GOP, "bf": "3"})


def remuxed(source, target, *, times=lambda time: time, packets=slice(None), **options):
    """Copy the packets of a video to another file, with `times` of the time stamps, in frames."""
    with av.open(source) as reader, av.open(str(target), "w", **options) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        found = [packet for packet in reader.demux(video=0) if packet.size][packets]
        frame = Fraction(1, 30) / found[0].time_base
        shown = [round(times(time / frame) * frame) for time in sorted(packet.pts for packet in found)]
        # As encoders do: a frame is decoded when the frame that is `delay` places before is shown.
        delay = round((found[0].pts - found[0].dts) / frame)
        decoded = [shown[0] - round((delay - i) * frame) for i in range(delay)] + shown
        for packet, dts in zip(found, decoded, strict=False):
            packet.pts, packet.dts = round(times(packet.pts / frame) * frame), dts
            packet.stream = stream
            writer.mux(packet)
    return str(target)


def patched(source, target, box, offset, number, size=4):
    """Copy a file, with another number at `offset` of the content of a box."""
    content = bytearray(open(source, "rb").read())
    start = content.index(box) + 4 + offset
    content[start : start + size] = number.to_bytes(size, "big", signed=True)
    target.write_bytes(content)
    return str(target)


def open_gop(codec):
    def make(make_video, h264, path):
        x264 = {"x264-params": "open-gop=1:bframes=3:keyint=15:min-keyint=15"}
        options = x264 if codec == "libx264" else {"x265-params": f"{X265}:open-gop=1"}
        return make_video(path / "v.mp4", frames=FRAMES, codec=codec, options={"crf": "12", **options})

    return make


def concatenated_ts(make_video, h264, path):
    part = remuxed(h264, path / "part.ts")
    (path / "v.ts").write_bytes(2 * open(part, "rb").read())
    return str(path / "v.ts")


def truncated(name, **options):
    def make(make_video, h264, path):
        content = open(remuxed(h264, path / f"whole{name}", **options), "rb").read()
        (path / f"v{name}").write_bytes(content[: int(0.7 * len(content))])
        return str(path / f"v{name}")

    return make


def copied(name, **changes):
    return lambda make_video, h264, path: remuxed(h264, path / name, **changes)


def encoded(name, **changes):
    return lambda make_video, h264, path: make_video(path / name, frames=FRAMES, **changes)


def concatenated(name, **second):
    """Two files with GOPs of 15 frames, one after the other; the second may be of another size."""

    def make(make_video, h264, path):
        b_frames = {**GOP, "bf": "3"}
        parts = [
            make_video(path / f"{i}{name}", frames=30, options=b_frames, **size) for i, size in enumerate(({}, second))
        ]
        (path / f"v{name}").write_bytes(b"".join(open(part, "rb").read() for part in parts))
        return str(path / f"v{name}")

    return make


def half_the_size_later(make_video, h264, path):
    """A webm as from a call whose bandwidth falls."""
    options = {"codec": "libvpx-vp9", "options": {"crf": "10", "cpu-used": "8", "g": "15"}, "frames": 30}
    large, small = make_video(path / "1.webm", **options), make_video(path / "2.webm", height=48, width=64, **options)
    with av.open(str(path / "v.webm"), "w") as writer, av.open(large) as first, av.open(small) as second:
        stream = writer.add_stream_from_template(first.streams.video[0])
        for number, reader in enumerate((first, second)):
            for packet in reader.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts = packet.pts + 1000 * number, packet.dts + 1000 * number
                    packet.stream = stream
                    writer.mux(packet)
    return str(path / "v.webm")


def several_edits(make_video, h264, path):
    late = remuxed(h264, path / "late.mp4", times=lambda time: time + 20)
    return patched(late, path / "v.mp4", b"elst", 12, 512 * 10)  # the pause becomes a part of the video


def cut_at_the_end(make_video, h264, path):
    return patched(h264, path / "v.mp4", b"elst", 8, 1200)  # of 2000 ms


VFR = lambda time: time + (time // 20) * 35 + (time % 3 == 1) * 0.4  # noqa: E731

# kind -> (how the file is made, whether its tables are sufficient)
KINDS = {
    "B frames": (copied("v.mp4"), True),
    "quicktime": (copied("v.mov"), True),
    "tables first": (copied("v.mp4", options={"movflags": "faststart"}), True),
    "no B frames": (encoded("v.mp4", options={**GOP, "bf": "0"}), True),
    "mpeg4": (encoded("v.mp4", codec="mpeg4", options={"g": "15", "qscale": "2"}), True),
    "variable frame rate": (copied("v.mp4", times=VFR), True),
    "variable frame rate, no B frames": (
        lambda make_video, h264, path: remuxed(
            make_video(path / "source.mp4", frames=FRAMES, options={**GOP, "bf": "0"}), path / "v.mp4", times=VFR
        ),
        True,
    ),
    "open GOP, h264": (open_gop("libx264"), True),
    "open GOP, h265": (open_gop("libx265"), True),
    "late start": (copied("v.mp4", times=lambda time: time + 20), True),
    "cut at the start": (copied("v.mp4", times=lambda time: time - 22, packets=slice(15, None)), True),
    "cut at the end": (cut_at_the_end, True),
    "several edits": (several_edits, False),
    "fragmented": (copied("v.mp4", options={"movflags": "frag_keyframe+empty_moov"}), False),
    "truncated mp4": (truncated(".mp4", options={"movflags": "faststart"}), False),
    "truncated mkv": (truncated(".mkv"), False),
    "matroska": (copied("v.mkv"), False),
    "matroska, variable frame rate": (copied("v.mkv", times=VFR), False),
    "webm": (encoded("v.webm", codec="libvpx-vp9", options={"crf": "10", "cpu-used": "8", "g": "15"}), False),
    "transport stream": (copied("v.ts"), False),
    "concatenated transport streams": (concatenated_ts, False),
    "avi": (encoded("v.avi", codec="mpeg4", options={"g": "15", "qscale": "2"}), False),
    "gif": (encoded("v.gif", codec="gif", pix_fmt="rgb8", rate=25, options={}), False),
}


B = {"g": "15", "qscale": "2", "bf": "2"}
COUNTED = {
    "h264 in avi": (encoded("v.avi", options={**GOP, "bf": "3"}), False),
    "h264 in avi, open GOP": (
        encoded("v.avi", options={"x264-params": "open-gop=1:bframes=3:keyint=15:min-keyint=15", "crf": "12"}),
        False,
    ),
    "mpeg4 with B frames in avi": (encoded("v.avi", codec="mpeg4", options=B), False),
    "concatenated h264": (concatenated(".ts"), False),
}
OTHERS = {
    "mpeg2 in mpg": (encoded("v.mpg", codec="mpeg2video", options=B), False),
    "mpeg2 in ts": (encoded("v.ts", codec="mpeg2video", options=B), False),
    "mpeg2 in mov": (encoded("v.mov", codec="mpeg2video", options=B), True),
    "h265 in mkv, open GOP": (encoded("v.mkv", codec="libx265", options={"x265-params": f"{X265}:open-gop=1"}), False),
    "h265 in ts": (encoded("v.ts", codec="libx265", options={"x265-params": X265}), False),
    "vp8 in mkv": (encoded("v.mkv", codec="libvpx", options={**VP8, "g": "15"}), False),
    "vp8 in ogv": (encoded("v.ogv", codec="libvpx", options={**VP8, "g": "15"}), False),
    "wmv2": (encoded("v.wmv", codec="wmv2", options={"g": "15", "qscale": "2"}), False),
    "msmpeg4 in avi": (encoded("v.avi", codec="msmpeg4", options={"g": "15", "qscale": "2"}), False),
    "h264 in flv": (copied("v.flv"), False),
    "flv1": (encoded("v.flv", codec="flv", options={"g": "15", "qscale": "2"}), False),
    "mjpeg in avi": (encoded("v.avi", codec="mjpeg", pix_fmt="yuvj420p", options={"qscale": "2"}), False),
    "size change in ts": (concatenated(".ts", height=48, width=64), False),
    "size change in webm": (half_the_size_later, False),
}
KINDS |= COUNTED | OTHERS


def mirrored(name):
    def make(make_video, h264, path):
        flipped = patched(h264, path / "flipped.mp4", b"tkhd", 40, -0x10000)
        return flipped if name.endswith(".mp4") else remuxed(flipped, path / name)

    return make


KINDS_OF_OTHERS = KINDS | {"mirrored mp4": (mirrored("v.mp4"), True), "mirrored mkv": (mirrored("v.mkv"), False)}


FAST = {
    "B frames",
    "variable frame rate",
    "open GOP, h264",
    "cut at the start",
    "several edits",
    "fragmented",
    "truncated mp4",
    "truncated mkv",
    "matroska",
    "transport stream",
    "concatenated transport streams",
    "h264 in avi",
    "concatenated h264",
    "mpeg4 with B frames in avi",
    "mpeg2 in mpg",
    "size change in ts",
    "mirrored mkv",
}
"""Kinds whose index or frames are found in a way of their own, and that are made quickly."""


def mostly_slow(kinds):
    return [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in kinds]


@pytest.fixture(scope="module")
def file_of(make_video, h264, tmp_path_factory):
    """The path of a file of a kind, which is made once."""

    @functools.cache
    def make(kind):
        return KINDS_OF_OTHERS[kind][0](make_video, h264, tmp_path_factory.mktemp("kind"))

    return make


def decoded_frames(path):
    """All frames in the order in which FFmpeg presents them, in the size of the first."""
    with av.open(path) as container:
        size = {"width": container.streams.video[0].width, "height": container.streams.video[0].height}
        try:
            return [frame.to_ndarray(format="rgb24", **size) for frame in container.decode(video=0)]
        except av.error.InvalidDataError:  # a truncated file
            return None


@pytest.mark.parametrize("kind", mostly_slow(KINDS))
def test_index_and_frames_are_those_of_reading_the_whole_file(kind, file_of):
    path, has_tables = file_of(kind), KINDS[kind][1]
    with av.open(path) as container:
        scanned = scan(container, container.streams.video[0])
    with open(path, "rb") as file:
        movie = read_movie(file)
    assert (movie is not None) == has_tables
    if movie is not None:
        np.testing.assert_array_equal(movie.tracks[0].times, scanned.times)
        assert set(scanned.key_times) <= set(movie.tracks[0].key_times)
    video = PyavVideo(path)
    assert video.index.scanned != has_tables
    assert video.num_frames == len(scanned.times)
    np.testing.assert_array_equal(video.times, scanned.seconds)
    everything = decoded_frames(path)
    if kind.startswith("truncated"):
        assert read_frames(video, np.arange(20), path).shape[0] == 20
        return
    assert video.num_frames == len(everything)
    rng = np.random.default_rng(0)
    some = [np.sort(rng.choice(len(everything), 5, replace=False)) for _ in range(4)]
    for indices in ([len(everything) - 1], [0], np.arange(len(everything)), *some, np.arange(0, len(everything), 7)):
        frames = read_frames(open_video(path, "pyav"), np.array(indices), path)
        for frame, index in zip(frames, indices, strict=True):
            assert np.abs(frame.astype(int) - everything[index]).mean() < 1.5, (indices, index)
    if has_tables:  # the time stamps are those expected, so that the file need not be read
        assert video._by_time(video.index, np.arange(video.num_frames)) is not None


READ_BY_OTHERS = {"B frames", "quicktime", "variable frame rate", "webm"}
"""Some of those that the other libraries must read themselves, or `data.decoder` would have no effect."""


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
@pytest.mark.parametrize("kind", mostly_slow(kind for kind in KINDS_OF_OTHERS if not kind.startswith("truncated")))
def test_all_decoders_give_the_frames_of_pyav(kind, decoder, file_of):
    path = file_of(kind)
    try:
        video = open_video(path, decoder)
    except ImportError as error:
        pytest.skip(str(error))
    if kind in READ_BY_OTHERS - ({"webm"} if decoder == "decord" else set()):
        assert not isinstance(video, PyavVideo)
    expected = open_video(path, "pyav")
    assert video.num_frames == expected.num_frames
    np.testing.assert_array_equal(video.times, expected.times)
    last = expected.num_frames - 1
    for indices in ([0, 1, 17, 18, 33], [last], [last // 2, last // 2 + 1], [7, 40 % last + 7]):
        one, two = (read_frames(v, np.array(indices), path).astype(int) for v in (video, expected))
        assert np.abs(one - two).mean((1, 2, 3)).max() < 2, indices


@pytest.mark.parametrize("kind", ["matroska", "transport stream", *COUNTED])
def test_a_late_frame_is_decoded_from_a_key_frame_nearby(kind, file_of, monkeypatch):
    video = PyavVideo(file_of(kind))
    from_beginning = []
    monkeypatch.setattr(video, "_open", lambda *_: from_beginning.append(True))
    if kind == "h264 in avi, open GOP":  # frames before a key frame need those before
        assert video.index.restarts.numbers.tolist() == [0]
        return
    decoded = video.frames_at(np.array([55]))
    assert decoded.shape == (1, 96, 128, 3)
    if video.index.restarts is None:
        assert not from_beginning
    else:
        assert video.index.restarts.numbers.tolist() == [0, 15, 30, 45]
        assert video._packets_from_restart(video.index.restarts, 3)[1] == 3


@pytest.mark.parametrize("lost", [0, 30])
def test_a_lost_key_frame_does_not_change_the_numbers_after_the_next_one(lost, file_of, tmp_path, numbers_of):
    """Frames in AVI are counted. Those after a lost first key frame are not decoded; others are, in a wrong order."""
    source = file_of("h264 in avi")
    content, restarts = bytearray(open(source, "rb").read()), PyavVideo(source).index.restarts
    chunk = content.rindex(b"00dc", 0, restarts.positions[restarts.numbers == lost].item() + 4)
    size = 8 + int.from_bytes(content[chunk + 4 : chunk + 8], "little")
    content[chunk : chunk + size] = bytes(size)
    path = str(tmp_path / "v.avi")
    (tmp_path / "v.avi").write_bytes(content)
    video = open_video(path, "pyav")
    assert video.num_frames == FRAMES - 1
    right = np.setdiff1d(np.arange(FRAMES), np.arange(lost and lost - 3, lost + 15))
    for numbers in (right, right[-7:], right[::9]):
        indices = np.where(numbers < lost, numbers, numbers - 1)
        np.testing.assert_array_equal(numbers_of(read_frames(video, indices, path)), numbers)
    if lost == 0:
        for indices in ([0, 20], [13], [3, 13, 14]):
            with pytest.raises(VideoError, match=f"frame {indices[0]} of the 59 in its index is missing"):
                read_frames(video, np.array(indices), path)


def test_a_rate_that_the_file_does_not_state_is_estimated(make_video, tmp_path):
    path = make_video(tmp_path / "v.ogv", codec="libvpx", frames=1, options=VP8)
    for decoder in ("pyav", "decord"):
        assert open_video(path, decoder).fps > 0


def test_a_video_that_is_no_longer_used_closes_its_file(h264, file_of):
    fragmented = file_of("fragmented")
    gc.disable()
    try:
        before = os.listdir("/proc/self/fd")
        for path in (h264, h264, fragmented, fragmented):
            open_video(path, "pyav").frames_at(np.arange(3))
        assert os.listdir("/proc/self/fd") == before
    finally:
        gc.enable()


def test_hidden_frames_are_not_counted(file_of, numbers_of):
    path = file_of("cut at the start")
    with av.open(path) as container:
        hidden = [packet.is_discard for packet in container.demux(video=0) if packet.size]
    assert 0 < sum(hidden) < len(hidden) == 45
    video = open_video(path, "pyav")
    assert video.num_frames == 45 - sum(hidden) == 38
    np.testing.assert_array_equal(numbers_of(read_frames(video, np.arange(38), path)), np.arange(22, 60))


def test_tables_that_do_not_fit_the_frames_are_not_trusted(h264, tmp_path, monkeypatch):
    expected = read_frames(open_video(h264, "pyav"), np.arange(7, 50, 5), h264)
    video = PyavVideo(h264)
    wrong = video.index.times + 1
    monkeypatch.setattr(video, "index", FrameIndex(wrong, wrong[::15], video.index.time_base, 30, scanned=False))
    np.testing.assert_array_equal(video.frames_at(np.arange(7, 50, 5)), expected)


def test_damaged_tables_are_not_read(h264):
    content = open(h264, "rb").read()
    start = content.index(b"moov")
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(400):
        damaged = bytearray(content)
        for position in rng.integers(start, len(content), 3):
            damaged[position] = rng.integers(256)
        read += read_movie(io.BytesIO(damaged)) is not None  # no error, whatever the bytes are
    assert read > 0
    assert read_movie(io.BytesIO(b"")) is None


def test_little_of_a_file_is_read(h264, tmp_path):
    path = remuxed(h264, tmp_path / "v.mp4", options={"movflags": "faststart"})
    padded = open(path, "ab")
    padded.write((1 << 24).to_bytes(4, "big") + b"free" + bytes((1 << 24) - 8))
    padded.close()

    class Counting(io.FileIO):
        total = 0

        def read(self, size=-1):
            content = super().read(size)
            Counting.total += len(content)
            return content

    with Counting(path) as file:
        open_video(file, "pyav").frames_at(np.array([50]))
    assert Counting.total < 1 << 20


def test_indices_are_kept_until_the_file_changes(h264, make_video, tmp_path):
    path = str(tmp_path / "v.mkv")
    remuxed(h264, path)
    first = PyavVideo(path).index
    assert PyavVideo(path).index is first
    remuxed(h264, path, packets=slice(0, 30))
    assert PyavVideo(path).num_frames == 30


def test_the_index_that_was_not_used_for_longest_is_forgotten(tmp_path):
    cache = IndexCache(max_frames=25)
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        open(path, "w").close()
        cache.put(path, FrameIndex(np.arange(10), np.arange(1), Fraction(1, 30), 30.0))
        cache.get(paths[0])
    assert [cache.get(path) is not None for path in paths] == [True, False, True]


def test_rounded_times_of_a_constant_rate_are_exact():
    times = np.round(np.arange(108_000) * 1001 / 30).astype(np.int64)  # ms
    index = FrameIndex(times, times[:1], Fraction(1, 1000), 29.97)  # the container's rate is rounded, too
    assert index.fps == pytest.approx(30000 / 1001)
    np.testing.assert_array_equal(index.seconds, np.arange(108_000) / index.fps)
    varying = FrameIndex(times**2, times[:1], Fraction(1, 1000), 29.97)
    np.testing.assert_allclose(varying.seconds, times**2 / 1000)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_pictures_are_turned_and_mirrored(turns, mirrored):
    picture = np.arange(2 * 3 * 3).reshape(2, 3, 3)
    turned = np.rot90(picture[:, ::-1] if mirrored else picture, k=-turns)
    # The matrix by its definition: where a picture's columns and rows go.
    matrix = np.eye(2, dtype=int) * [-1 if mirrored else 1, 1]
    for _ in range(turns):  # clockwise: columns become rows, rows become columns from right to left
        matrix = matrix @ np.array([[0, 1], [-1, 0]])
    full = np.zeros((3, 3), dtype=np.int32)
    full[:2, :2] = matrix << 16
    np.testing.assert_array_equal(upright(picture, full), turned)


def test_the_mirroring_of_a_file_is_applied(h264, tmp_path):
    mirrored = patched(h264, tmp_path / "v.mp4", b"tkhd", 40, -0x10000)
    expected = read_frames(open_video(h264, "pyav"), np.arange(3), h264)[:, :, ::-1]
    np.testing.assert_array_equal(read_frames(open_video(mirrored, "pyav"), np.arange(3), mirrored), expected)


def test_a_file_of_hidden_frames_only_is_an_error(h264, tmp_path):
    path = patched(h264, tmp_path / "v.mp4", b"elst", 12, 1 << 30)
    with pytest.raises(VideoError, match="v.mp4"):
        open_video(path, "pyav")


@pytest.mark.parametrize("damage", ["a table of no whole number of rows", "times beyond 64 bits"])
def test_damaged_tables_are_scanned(make_video, tmp_path, damage):
    """The tables are at the end, where nothing depends on their length."""
    content = open(make_video(tmp_path / "v.mp4", frames=5), "rb").read()
    if damage == "times beyond 64 bits":
        pause, shown = struct.pack(">Qqi", 1 << 63, -1, 1 << 16), struct.pack(">Qqi", 0, 0, 1 << 16)
        content = with_box(
            content, [b"moov", b"trak", b"edts", b"elst"], struct.pack(">II", 1 << 24, 2) + pause + shown
        )
        assert read_movie(io.BytesIO(content)) is None
        return
    path = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsz"]
    sizes = content.index(b"stsz")
    length = int.from_bytes(content[sizes - 4 : sizes], "big")
    content = with_box(content, path, content[sizes + 4 : sizes - 4 + length] + b"\0")
    assert read_movie(io.BytesIO(content)) is None
    assert open_video(io.BytesIO(content), "pyav").num_frames == 5


def with_box(content, path, new):
    """Replace the content of the first box of this path."""
    position = 0
    while position < len(content):
        length = int.from_bytes(content[position : position + 4], "big")
        if content[position + 4 : position + 8] == path[0]:
            inner = with_box(content[position + 8 : position + length], path[1:], new) if path[1:] else new
            header = struct.pack(">I4s", len(inner) + 8, path[0])
            return content[:position] + header + inner + content[position + length :]
        position += length
    raise AssertionError(path)
