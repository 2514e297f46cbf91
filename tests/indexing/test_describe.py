import os

import av
import numpy as np
import pytest
import scipy.fft

from tests.data.conftest import write_video
from tubelet.indexing.describe import BLOCK, content_hash, describe
from tubelet.indexing.options import SCHEMA, ReadingOptions
from tubelet.indexing.perceptual import perceptual_hash

READ = ReadingOptions()


def packets(path):
    """Number of frames and median seconds between key frames, from all packets."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        read = [(packet.pts, packet.is_keyframe) for packet in container.demux(stream) if packet.size]
        keys = np.sort([time for time, is_key in read if is_key])
        return len(read), float(np.median(np.diff(keys)) * stream.time_base) if len(keys) > 1 else None


@pytest.mark.parametrize(
    ("name", "container", "codec", "size", "fps"),
    [
        ("a.mp4", "mov", "h264", (128, 96), 30),
        ("b.mkv", "matroska", "h264", (128, 64), 15),
        ("c.avi", "avi", "mpeg4", (128, 96), 25),
        ("sub dir/d.ts", "mpegts", "mpeg2video", (128, 96), 20),
    ],
)
@pytest.mark.parametrize("count_frames", [False, True])
def test_the_row_of_a_video_agrees_with_all_its_packets(folder, name, container, codec, size, fps, count_frames):
    row = describe(str(folder / name), READ.model_copy(update={"count_frames": count_frames}))
    status = os.stat(folder / name)
    assert row.keys() <= set(SCHEMA.names)
    assert (row["readable"], row["size"], row["mtime"]) == (True, status.st_size, status.st_mtime_ns)
    assert (row["container"], row["codec"], row["width"], row["height"]) == (container, codec, *size)
    frames, key_frame_seconds = packets(folder / name)
    assert row["frames_from"] == "scan" or not count_frames
    assert abs(row["frames"] - frames) <= (row["frames_from"] == "duration")
    assert row["fps"] == pytest.approx(fps, rel=0.01)
    assert row["duration"] == pytest.approx(frames / fps, abs=1.5 / fps)
    assert row["key_frame_seconds"] == pytest.approx(key_frame_seconds or row["duration"], abs=1e-3)
    assert "audio" not in row
    assert row["rotation"] == 0


@pytest.mark.parametrize("name", ["empty.mp4", "text.mp4", "cut.mp4", "gone.mp4"])
def test_a_file_that_cannot_be_read_is_described_with_the_reason(folder, name):
    row = describe(str(folder / name), READ)
    assert not row["readable"]
    assert row["reason"]
    assert str(folder) not in row["reason"]
    assert ("size" in row) == (name != "gone.mp4")


def test_damaged_frames_are_noticed(folder, tmp_path):
    content = bytearray((folder / "a.mp4").read_bytes())
    start = content.index(b"mdat") + 4
    content[start : start + 6000] = bytes(6000)
    (tmp_path / "damaged.mp4").write_bytes(content)
    row = describe(str(tmp_path / "damaged.mp4"), READ)
    assert (row["readable"], row["codec"], row["frames"]) == (False, "h264", 60)


def test_content_hash_depends_on_size_and_blocks_or_on_every_byte(tmp_path):
    path = tmp_path / "file"
    content = bytearray(os.urandom(10 * BLOCK))
    path.write_bytes(content)
    hashes = {whole: content_hash(str(path), len(content), whole) for whole in (False, True)}
    assert len(set(hashes.values())) == 2
    for position, blocks_differ in ((0, True), (2 * BLOCK, False), (5 * BLOCK, True), (10 * BLOCK - 1, True)):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert (content_hash(str(path), len(content), False) != hashes[False]) == blocks_differ
        assert content_hash(str(path), len(content), True) != hashes[True]


def slow_hash(frames):
    """The hash as its docstring says it, by scipy."""
    order = sorted(((u, v) for u in range(32) for v in range(32)), key=lambda uv: (uv[0] + uv[1], uv[0]))[1:65]
    value = 0
    for bit in range(64):
        transformed = scipy.fft.dctn(np.asarray(frames[bit % 4], float), norm="ortho")
        lowest = [transformed[u, v] for u, v in order]
        value = 2 * value + (lowest[bit] > np.median(lowest))
    return value


def test_perceptual_hash_is_that_of_its_description():
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    assert perceptual_hash(frames) == slow_hash(frames)
    assert perceptual_hash(np.full((4, 32, 32), 200)) is None


def scenes(path, seed, *, height, width, rate=24, crf="20"):
    """A video of 48 frames of smooth random pictures, which move and change in the middle."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: 1 : height * 1j, : 1 : width * 1j]
    waves = [rng.uniform(-9, 9, (8, 2)), rng.uniform(-9, 9, (8, 2))]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": crf, "g": str(rng.integers(5, 50))})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(48):
            picture = sum(np.sin(a * y + b * x + number / 9) for a, b in waves[number >= 24])
            gray = (127 + 14 * picture).clip(0, 255).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(np.repeat(gray[..., None], 3, -1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return describe(str(path), READ)["perceptual_hash"]


def test_scaled_and_recompressed_copies_have_near_hashes_and_other_videos_have_far_ones(tmp_path):
    first, second = [], []
    for seed in range(6):
        first.append(scenes(tmp_path / "a.mp4", seed, height=192, width=256))
        second.append(scenes(tmp_path / "b.mp4", seed, height=72, width=128, rate=12, crf="33"))
    distances = np.bitwise_count(np.array(first, np.uint64)[:, None] ^ np.array(second, np.uint64))
    assert np.diag(distances).max() <= 10
    assert distances[~np.eye(6, dtype=bool)].min() >= 16


def test_a_rotated_file_has_the_hash_of_its_upright_frames(tmp_path):
    hashes = []
    for rotation in (0, 90, 180, 270):
        path = tmp_path / f"{rotation}.mp4"
        with av.open(write_video(tmp_path / "plain.mp4")) as plain, av.open(str(path), "w") as rotated:
            source = plain.streams.video[0]
            stream = rotated.add_stream_from_template(source)
            stream.set_display_rotation(rotation)
            for packet in plain.demux(source):
                if packet.dts is not None:
                    packet.stream = stream
                    rotated.mux(packet)
        row = describe(str(path), READ)
        assert row["rotation"] in (rotation, -rotation % 360)
        hashes.append(row["perceptual_hash"])
    assert len(set(hashes)) == 4
