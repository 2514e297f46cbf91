"""Packing: the clips are those of the sources, and nothing is lost when it is stopped."""

import hashlib
import os
import signal
import struct
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from app.pack import workers
from app.pack.encode import encode_video
from app.pack.options import EncodingOptions, Options, VerificationOptions
from app.pack.shard import ShardWriter
from app.pack.train import main
from tests.data.conftest import frame_numbers, write_video
from tubelet.config import ConfigError, UserError, check
from tubelet.data import DataConfig, Draw, webdataset
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.sources import write_list
from tubelet.data.storage import StorageConfig
from tubelet.data.transforms import EvalTransform
from tubelet.runtime.distributed import World

FAST = {"preset": "ultrafast", "tune": "fastdecode"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Seven videos with labels, one of them damaged."""
    folder = tmp_path_factory.mktemp("sources")
    paths = [folder / f"{number} ü.mp4" for number in range(7)]
    for number, path in enumerate(paths):
        write_video(path, frames=20 + number, height=96, width=128)
    paths[4].write_bytes(paths[4].read_bytes()[:3000])
    write_list(folder / "list.csv", paths, [10 + number for number in range(7)])
    return folder / "list.csv"


def options(videos, folder, **changed):
    raw = {"videos_per_shard": 3, "processes": 2, "encoding": {"short_side": 64, "crf": 10, "options": FAST}}
    return check(
        {"data": {"datasets": [str(videos)]}, "folder": str(folder), "app": "pack", **raw, **changed}, Options, "test"
    )


def digests(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "config.yaml"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def packed(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    main(options(videos, folder), World())
    return folder


def test_the_shards_have_the_videos_their_labels_and_a_table(packed, videos):
    table = pq.read_table(packed / "clips.parquet").to_pylist()
    assert [row["label"] for row in table] == [10, 11, 12, 13, 15, 16]
    assert [row["frames"] for row in table] == [20, 21, 22, 23, 25, 26]
    assert all(row["psnr"] > 30 and (row["width"], row["height"]) == (86, 64) for row in table)
    bad = (packed / "bad_files.txt").read_text()
    assert bad.startswith(f"{videos.parent}/4 ü.mp4\t")
    assert len(bad.splitlines()) == 1
    data = {"num_frames": 4, "sampling_rate": 2, "crop_size": 32, "format": "webdataset"}
    dataset = webdataset.Dataset(check({"datasets": [str(packed)], **data}, DataConfig, "test"), EvalTransform(32))
    assert list(dataset.labels) == [10, 11, 12, 13, 15, 16]
    assert not list((packed / "tables").glob("*.tmp"))
    for index, row in enumerate(table):
        video = dataset.open(dataset.paths[index])
        assert (video.num_frames, video.fps) == (row["frames"], 30)
        numbers = frame_numbers(read_frames(video, np.arange(video.num_frames), ""))
        np.testing.assert_array_equal(numbers, np.arange(video.num_frames))
        assert dataset[Draw(0, 0, index, 0)].clips.shape == (1, 3, 4, 32, 32)


def test_the_library_reads_the_shards(packed):
    library = pytest.importorskip("webdataset")
    samples = list(
        library.WebDataset([str(path) for path in sorted(packed.glob("*.tar"))], shardshuffle=False).decode()
    )
    assert [sample["cls"] for sample in samples] == [10, 11, 12, 13, 15, 16]
    assert [sample["json"]["frames"] for sample in samples] == [20, 21, 22, 23, 25, 26]


def test_processes_tasks_and_a_resume_write_the_same_bytes(packed, videos, tmp_path):
    expected = digests(packed)
    main(options(videos, tmp_path / "one", processes=1), World())
    assert digests(tmp_path / "one") == expected
    for task in (1, 0):
        changed = {"output": str(tmp_path / "shared"), "tasks": 2, "task": task}
        main(options(videos, tmp_path / f"task {task}", **changed), World())
        assert (tmp_path / "shared" / "clips.parquet").exists() == (task == 0)
    assert digests(tmp_path / "shared") == expected
    before = (packed / "shard-000000.tar").stat().st_mtime_ns
    main(options(videos, packed), World())
    assert (packed / "shard-000000.tar").stat().st_mtime_ns == before


def test_the_default_encoder_writes_the_same_bytes_each_time(tmp_path):
    path = tmp_path / "noise.mp4"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options={"crf": "23"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        background = rng.integers(60, 200, (96, 96, 3))
        for t in range(16):
            picture = background[t : t + 64, 2 * t : 2 * t + 64] + rng.integers(-30, 30, (64, 64, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    encoded = set()
    for _ in range(20):
        (clip,) = encode_video(str(path), EncodingOptions(), VerificationOptions(), StorageConfig())
        encoded.add(clip.content)
    assert len(encoded) == 1


@pytest.mark.slow
def test_a_kill_loses_at_most_the_shards_under_construction(packed, videos, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "app.main", "--fname", "configs/data/pack.yaml", "--devices", "cpu",
               f"folder={folder}", f"data.datasets=[{videos}]", "videos_per_shard=3", "processes=1",
               "encoding.short_side=64", "encoding.crf=10",
               "encoding.options={preset: ultrafast, tune: fastdecode}"]  # fmt: skip
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "tables" / "shard-000000.parquet").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = folder / f"shard-000001.tar.{'0' * 32}.tmp"
    left.write_bytes(b"of a killed process")
    kept = (folder / "shard-000000.tar").stat().st_mtime_ns
    main(options(videos, folder), World())
    assert (folder / "shard-000000.tar").stat().st_mtime_ns == kept
    (folder / ".lock").unlink()  # of the killed process
    assert digests(folder) == digests(packed)


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["crash", "hang"])
def test_a_video_that_crashes_or_blocks_its_process_is_listed(videos, tmp_path, monkeypatch, failure):
    encode = ShardWriter._encode

    def failing(self, path):
        if path.endswith("1 ü.mp4"):
            os.kill(os.getpid(), signal.SIGKILL) if failure == "crash" else time.sleep(1000)
        return encode(self, path)

    monkeypatch.setattr(ShardWriter, "_encode", failing)
    main(options(videos, tmp_path, timeout=10 if failure == "crash" else 3), World())
    reason = "exit status -9" if failure == "crash" else "more than 3 s"
    bad = (tmp_path / "bad_files.txt").read_text().splitlines()
    assert [line.partition("\t")[0][-8:] for line in bad] == ["/1 ü.mp4", "/4 ü.mp4"]
    assert reason in bad[0]
    assert len(pq.read_table(tmp_path / "clips.parquet")) == 5


def test_an_error_that_is_not_of_a_video_stops_it(videos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(workers.ShardWriter, "_remove_leftovers", full)
    with pytest.raises(UserError, match="shard 0: OSError: No space left on device.*the same command continues"):
        main(options(videos, tmp_path, processes=1), World())


def test_other_options_or_videos_in_the_same_folder_are_an_error(packed, videos, tmp_path):
    with pytest.raises(ConfigError, match="encoding.gop: 16 there, 8 here"):
        main(options(videos, packed, encoding={"short_side": 64, "crf": 10, "options": FAST, "gop": 8}), World())
    (tmp_path / "v").mkdir()
    for name in ("a", "b"):
        write_video(tmp_path / "v" / f"{name}.mp4", frames=3)
    main(options(tmp_path / "v", tmp_path / "out"), World())
    (tmp_path / "v" / "a.mp4").rename(tmp_path / "v" / "c.mp4")
    with pytest.raises(ConfigError, match="have changed"):
        main(options(tmp_path / "v", tmp_path / "out"), World())


def test_files_instead_of_shards(packed, videos, tmp_path):
    main(options(videos, tmp_path, format="files"), World())
    rows = pq.read_table(tmp_path / "clips.parquet").to_pylist()
    assert rows[3]["path"] == "shard-000001/00000003.mp4"
    assert open_video(str(tmp_path / rows[3]["path"]), "pyav").num_frames == 23


# ---------------------------------------------------------------- encoding


def encode(path, verification=VerificationOptions(), **changed):  # noqa: B008
    encoding = EncodingOptions(**{"options": FAST, **changed})
    return list(encode_video(str(path), encoding, verification, StorageConfig()))


def frames_of(clip, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(clip.content)
    video = open_video(str(tmp_path / "clip.mp4"), "pyav")
    return read_frames(video, np.arange(video.num_frames), ""), video.fps


def test_clips_and_rates_have_the_right_moments(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=50, rate=25)
    clips = encode(path, clip_seconds=0.8)
    assert [(clip.frames, round(clip.start, 6), round(clip.duration, 6)) for clip in clips] == [
        (20, 0.0, 0.8), (20, 0.8, 0.8), (10, 1.6, 0.4)
    ]  # fmt: skip
    shown = np.concatenate([frame_numbers(frames_of(clip, tmp_path)[0]) for clip in clips])
    np.testing.assert_array_equal(shown, np.arange(50))
    (half,) = encode(path, fps=10)
    frames, fps = frames_of(half, tmp_path)
    assert fps == 10
    np.testing.assert_array_equal(frame_numbers(frames), np.arange(20) * 25 // 10)


def test_key_frames_size_and_quality(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=50, height=96, width=130)
    (clip,) = encode(path, gop=8, short_side=48)
    assert (clip.height, clip.width) == (48, 64)
    (tmp_path / "clip.mp4").write_bytes(clip.content)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.size and packet.is_keyframe]
    assert max(np.diff(keys)) <= 8
    assert (encode(path, short_side=500)[0].height, encode(path, short_side=None)[0].height) == (96, 96)
    worse = encode(path, crf=45, verification=VerificationOptions(min_psnr=0))[0]
    assert worse.psnr + 5 < encode(path)[0].psnr
    with pytest.raises(Exception, match="PSNR .* below"):
        encode(path, crf=45, verification=VerificationOptions(min_psnr=40))


def test_psnr_is_that_of_the_frames(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=9)
    (clip,) = encode(path, crf=30, verification=VerificationOptions(frames=9))
    video = open_video(path, "pyav")
    source = read_frames(video, np.arange(9), "")
    error = np.mean((frames_of(clip, tmp_path)[0].astype(float) - source) ** 2)
    assert clip.psnr == pytest.approx(10 * np.log10(255**2 / error), abs=1.0)


@pytest.mark.parametrize(("pix_fmt", "codec"), [("yuv420p", "libx264"), ("yuv444p", "libx264"), ("yuvj420p", "mjpeg")])
def test_colors_are_kept(pix_fmt, codec, tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=5, pix_fmt=pix_fmt, codec=codec, options={"qscale": "1", "crf": "5"})
    source = read_frames(open_video(path, "pyav"), np.arange(5), "").astype(float)
    frames = frames_of(encode(path, crf=5)[0], tmp_path)[0]
    assert np.abs(frames.mean((1, 2)) - source.mean((1, 2))).max() < 2.5


def test_audio_is_dropped_or_cut_with_the_clips(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        video, audio = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16000)
        video.width, video.height, video.pix_fmt, audio.layout = 64, 64, "yuv420p", "mono"
        rng = np.random.default_rng(0)
        for _ in range(50):
            container.mux(video.encode(av.VideoFrame.from_ndarray(rng.integers(0, 255, (64, 64, 3), np.uint8))))
            sound = av.AudioFrame.from_ndarray(rng.integers(-9999, 9999, (1, 640), np.int16), "s16", "mono")
            sound.sample_rate = 16000
            container.mux(audio.encode(sound))
        container.mux([*video.encode(None), *audio.encode(None)])
    for kept in (False, True):
        for clip in encode(path, audio=kept, clip_seconds=1.0, verification=VerificationOptions(min_psnr=5)):
            (tmp_path / "clip.mp4").write_bytes(clip.content)
            with av.open(str(tmp_path / "clip.mp4")) as container:
                assert len(container.streams.audio) == kept
                assert container.streams.video[0].frames == 25
                if kept:
                    seconds = float(container.streams.audio[0].duration * container.streams.audio[0].time_base)
                    assert seconds == pytest.approx(1.0, abs=0.1)


def test_after_a_long_frame_clips_have_their_length_again(tmp_path):
    """As in recordings of a screen; there were clips of one frame until their number had caught up with the time."""
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 10)
        for time in [*range(10), *range(205, 225)]:
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), time, np.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clips = encode(path, clip_seconds=1)
    assert [clip.frames for clip in clips] == [10, 5, 10, 5]
    assert [round(clip.start, 6) for clip in clips] == [0, 20.5, 21, 22]


@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, -1, 0), (0, 1, 1, 0), (0, -1, -1, 0)])
def test_clips_are_turned_and_mirrored_as_the_header_says(tmp_path, matrix):
    content = bytearray(open(write_video(tmp_path / "v.mp4", frames=3, height=48, width=64), "rb").read())
    (a, b, c, d), header = matrix, content.index(b"tkhd") + 44
    content[header : header + 20] = struct.pack(">5i", *(65536 * x for x in (a, b, 0, c, d)))
    (tmp_path / "v.mp4").write_bytes(content)
    source = read_frames(open_video(str(tmp_path / "v.mp4"), "pyav"), np.arange(3), "").astype(float)
    (clip,) = encode(tmp_path / "v.mp4", crf=5)
    frames = frames_of(clip, tmp_path)[0]
    assert frames.shape == source.shape
    assert np.abs(frames - source).mean() < 4


def test_a_name_that_is_not_utf_8_is_packed(tmp_path):
    (tmp_path / "v").mkdir()
    os.rename(write_video(tmp_path / "v" / "a.mp4", frames=3), os.fsencode(tmp_path) + b"/v/\xff.mp4")
    with open(os.fsencode(tmp_path) + b"/v/\xfe.mp4", "wb") as file:
        file.write(b"no video")
    for _ in range(2):  # a second call finds it complete
        main(options(tmp_path / "v", tmp_path / "out"), World())
    assert pq.read_table(tmp_path / "out" / "clips.parquet")["source"].to_pylist() == [f"{tmp_path}/v/\\xff.mp4"]


def test_other_labels_are_an_error(tmp_path):
    path = Path(write_video(tmp_path / "a.mp4", frames=3))
    write_list(tmp_path / "list.csv", [path], [1])
    main(options(tmp_path / "list.csv", tmp_path / "out"), World())
    write_list(tmp_path / "list.csv", [path], [2])
    with pytest.raises(ConfigError, match="other videos or labels"):
        main(options(tmp_path / "list.csv", tmp_path / "out"), World())
