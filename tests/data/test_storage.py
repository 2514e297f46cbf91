"""Remote files: what is downloaded, what happens when requests fail, and that credentials are never shown."""

import io
import logging
import multiprocessing
import os
import time

import av
import numpy as np
import pytest
import torch

from tests.data.batches import load
from tests.data.servers import Server
from tubelet.config import ConfigError, check
from tubelet.config.addresses import has_credentials, public
from tubelet.data import AugConfig, DataConfig, Draw, VideoError, storage, video_dataset
from tubelet.data.bad_files import BadFiles
from tubelet.data.storage import RemotePart, StorageConfig, StorageError
from tubelet.data.transforms import EvalTransform, TrainTransform

pytest.importorskip("aiohttp")

FAST = {"retries": 3, "timeout": 2, "backoff": 0.01}
SECRET = "c2VjcmV0"  # noqa: S105


@pytest.fixture(scope="module")
def folder(tmp_path_factory, videos):
    folder = tmp_path_factory.mktemp("served")
    (folder / "random.bin").write_bytes(np.random.default_rng(0).bytes(1_000_000))
    (folder / "set" / "sub folder").mkdir(parents=True)
    (folder / "set" / "a.mp4").write_bytes((videos / "a.mp4").read_bytes())
    (folder / "set" / "sub folder" / "ü #1.mp4").write_bytes((videos / "b.mp4").read_bytes())
    (folder / "set" / "readme.txt").write_text("no video")
    (folder / "list.csv").write_text("set/a.mp4 3\n'set/sub folder/ü #1.mp4' 4\n")
    return folder


@pytest.fixture(scope="module")
def running(folder):
    with Server(folder) as server:
        yield server


@pytest.fixture
def server(running):
    running.reset()
    return running


def data(*entries, **changed):
    raw = {"sampling_rate": 2, "num_frames": 4, "crop_size": 32, "storage": FAST} | changed
    return check({"datasets": [str(entry) for entry in entries], **raw}, DataConfig, "test")


def test_any_reads_return_the_bytes_of_the_file(server, folder):
    content = (folder / "random.bin").read_bytes()
    rng = np.random.default_rng(1)
    for options in (
        StorageConfig(block_size=1000, read_ahead=10_000, whole_file=0, cache_size=20_000),
        StorageConfig(block_size=512, read_ahead=0, whole_file=0, cache_size=0),
        StorageConfig(),
    ):
        start, size = 100, 900_000
        part = RemotePart(f"{server.url}/random.bin", start, size, options)
        expected = io.BytesIO(content[start : start + size])
        for _ in range(15):
            if rng.random() < 0.5:
                position = int(rng.integers(size + 10))
                assert part.seek(position) == expected.seek(position)
            length = int(rng.integers(0, 30_000))
            assert part.read(length) == expected.read(length)
            assert part.tell() == expected.tell()
        assert part.seek(-10, io.SEEK_END) == expected.seek(-10, io.SEEK_END)
        assert part.read() == expected.read()


def test_requests_grow_while_a_file_is_read_in_order_and_memory_is_bounded(server):
    options = StorageConfig(block_size=10_000, read_ahead=80_000, whole_file=0, cache_size=100_000)
    part = RemotePart(f"{server.url}/random.bin", 0, 1_000_000, options)
    for _ in range(100):
        part.read(5000)
        assert sum(map(len, part._blocks.values())) <= 100_000
    sizes = [request.sent // 10_000 for request in server.requests]
    assert sizes[:5] == [2, 4, 8, 8, 8]
    server.reset()
    part.seek(900_000)
    part.read(100)
    part.seek(100)
    part.read(100)
    assert [request.sent for request in server.requests] == [10_000, 10_000]
    server.reset()
    for whole_file, sent in ((999_999, 20_000), (1_000_000, 1_000_000)):
        options = StorageConfig(block_size=10_000, whole_file=whole_file)
        RemotePart(f"{server.url}/random.bin", 0, 1_000_000, options).read(1)
        assert server.requests[-1].sent == sent


def test_folders_and_lists_give_the_clips_of_local_files(server, folder):
    transform = TrainTransform(AugConfig(), 32)
    names = ["a.mp4", "sub folder/ü #1.mp4"]
    for entry, local, labels in (("set", "set", [-1, -1]), ("set/", "set", [-1, -1]), ("list.csv", "list.csv", [3, 4])):
        remote = video_dataset.Dataset(data(f"{server.url}/{entry}"), transform, seed=3)
        plain = video_dataset.Dataset(data(folder / local), transform, seed=3)
        assert list(remote.labels) == labels
        assert [path.replace("%20", " ").replace("%C3%BC", "ü").replace("%23", "#") for path in remote.paths] == [
            f"{server.url}/set/{name}" for name in names
        ]
        for index in range(2):
            assert torch.equal(remote[Draw(0, 0, index, 0)].clips, plain[Draw(0, 0, index, 0)].clips)
    uri = video_dataset.Dataset(data(f"file://{folder}/set/a.mp4"), transform, seed=3)
    assert torch.equal(uri[Draw(0, 0, 0, 0)].clips, plain[Draw(0, 0, 0, 0)].clips)


@pytest.mark.parametrize(("entry", "reason"), [
    ("gone", "there is nothing in this folder"),
    ("gone.csv", "HTTP status 404"),
    ("set/sub folder/deep.csv", "HTTP status 404"),
])  # fmt: skip
def test_sources_that_do_not_exist_are_an_error(server, entry, reason):
    with pytest.raises(ConfigError, match=f"{entry}': .*(no such file|{reason})"):
        video_dataset.Dataset(data(f"{server.url}/{entry}"), EvalTransform(32))


def test_images_are_read_from_addresses(server, folder):
    from PIL import Image

    from tubelet.data import image_dataset

    (folder / "images" / "dog").mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(folder / "images/dog/x.png")
    options = {"num_frames": 1, "sampling_rate": 1}
    remote = image_dataset.Dataset(data(f"{server.url}/images", **options), EvalTransform(32))
    local = image_dataset.Dataset(data(folder / "images", **options), EvalTransform(32))
    assert (remote.classes, list(remote.labels)) == (["dog"], [0])
    assert torch.equal(remote[Draw(0, 0, 0, 0)].clips, local[Draw(0, 0, 0, 0)].clips)
    server.always = 403
    with pytest.raises(VideoError, match=r"x.png: HTTP status 403"):
        remote[Draw(0, 0, 0, 0)]


# ---------------------------------------------------------------- faults

PASSING = [503, 500, 429, "reset", "truncated", "slow"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_retried(server, folder, fault):
    server.faults = [fault, fault]
    options = StorageConfig(**{**FAST, "timeout": 0.5})
    began = time.monotonic()
    assert storage.read_file(f"{server.url}/list.csv", options) == (folder / "list.csv").read_bytes()
    part = RemotePart(f"{server.url}/random.bin", 0, 1_000_000, options)
    server.faults = [fault, fault]
    assert part.read(1_000_000) == (folder / "random.bin").read_bytes()
    assert len(server.requests) == 6 if fault != "reset" else 6 <= len(server.requests) <= 10  # aiohttp retries, too
    assert time.monotonic() - began < 4


@pytest.mark.parametrize(("fault", "reason"), [
    (503, "HTTP status 503, 4 attempts"),
    ("reset", "(ServerDisconnectedError|ClientOSError|ConnectionResetError): .*, 4 attempts"),
    ("truncated", "(ContentLengthError|ClientPayloadError): .*, 4 attempts"),
    ("slow", "no answer within 0.3 s, 4 attempts"),
])  # fmt: skip
def test_a_lasting_fault_ends_with_the_reason(server, fault, reason):
    options = StorageConfig(**{**FAST, "timeout": 0.3})
    part = RemotePart(f"{server.url}/random.bin", 0, 1_000_000, options)
    server.always = fault
    with pytest.raises(StorageError, match=f"^{reason}$"):
        part.read(10)
    requests = len(server.requests)
    assert requests == 4 if fault != "reset" else 4 <= requests <= 8  # aiohttp repeats a request after a reset
    with pytest.raises(StorageError):
        part.read(10)
    assert len(server.requests) == requests  # a file that has failed is not tried again


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_is_missing_or_forbidden_is_not_tried_again(server, status):
    part = RemotePart(f"{server.url}/random.bin", 0, 1_000_000, StorageConfig(**FAST))
    server.always = status
    with pytest.raises(StorageError, match=rf"^(HTTP status {status}|no such file)$"):
        part.read(10)
    assert len(server.requests) == 1


def test_retries_wait_longer_each_time(server, monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    server.faults = [503] * 6
    storage.read_file(f"{server.url}/list.csv", StorageConfig(retries=6, backoff=1, max_backoff=8))
    assert all(low <= seconds <= high for seconds, low, high in zip(
        waited, (0.5, 1, 2, 4, 4, 4), (1, 2, 4, 8, 8, 8), strict=True))  # fmt: skip


def test_nothing_listens(server):
    with pytest.raises(StorageError, match="ConnectionRefusedError.*, 2 attempts"):
        storage.read_file("http://127.0.0.1:9/x", StorageConfig(retries=1, backoff=0))


def test_a_server_without_ranges_is_refused(folder):
    with Server(folder, ranges=False) as server:
        part = RemotePart(f"{server.url}/random.bin", 0, 1_000_000, StorageConfig(whole_file=0))
        with pytest.raises(StorageError, match="ignores ranges"):
            part.read(10)


@pytest.fixture(scope="module")
def large_video(folder, make_video):
    return make_video(folder / "large.mp4", frames=60, height=120, width=160, options={"crf": "1"})


@pytest.mark.parametrize(("decoder", "at"), [
    ("pyav", 0), ("pyav", 1), ("pyav", 2), ("pyav", 3), ("decord", 1), ("torchcodec", 1), ("torchcodec", 3)
])  # fmt: skip
def test_a_file_that_fails_while_it_is_read_counts_as_bad_with_the_reason(server, folder, large_video, decoder, at):
    size = (folder / "large.mp4").stat().st_size
    limits = {**FAST, "retries": 1, "block_size": size // 6, "read_ahead": 0, "whole_file": 0}
    options = data(f"{server.url}/large.mp4", folder / "set" / "a.mp4", decoder=decoder, storage=limits)
    server.faults, server.always = ["ok"] * at, 503
    try:
        sample = video_dataset.Dataset(options, EvalTransform(32), on_error="replace")[Draw(0, 0, 0, 0)]
    except (ImportError, ConfigError) as error:
        if "finds no FFmpeg" not in str(error):
            raise
        pytest.skip(str(error))
    assert sample.path.endswith("a.mp4")
    assert sample.bad[0].path == f"{server.url}/large.mp4"
    assert "HTTP status 503, 2 attempts" in sample.bad[0].reason


def test_a_clip_of_a_long_video_downloads_a_part_of_it(server, folder):
    """With the index at the beginning of the file, and at its end, where FFmpeg writes it by default."""
    rng = np.random.default_rng(0)
    for name, container_options in (("front", {"movflags": "+faststart"}), ("end", {})):
        with av.open(str(folder / f"{name}.mp4"), "w", options=container_options) as container:
            stream = container.add_stream("mpeg4", rate=30, options={"g": "12", "b": "8000000"})
            stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
            frames = [av.VideoFrame.from_ndarray(rng.integers(0, 256, (96, 128, 3), np.uint8)) for _ in range(10)]
            for number in range(600):
                frame = frames[number % 10]
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        size = (folder / f"{name}.mp4").stat().st_size
        assert size > 3_000_000
        options = data(f"{server.url}/{name}.mp4", storage={"block_size": 65536})
        dataset = video_dataset.Dataset(options, EvalTransform(32))
        for epoch in range(2):
            server.reset()
            remote = dataset[Draw(0, epoch, 0, 0)]
            assert server.bytes_sent < size / 5
        local = video_dataset.Dataset(data(folder / f"{name}.mp4"), EvalTransform(32))[Draw(0, 1, 0, 0)]
        assert torch.equal(remote.clips, local.clips)


# ---------------------------------------------------------------- processes


def batches(options, **part):
    dataset = video_dataset.Dataset(options, TrainTransform(AugConfig(), 32), seed=7, on_error="replace")
    return load(dataset, last=3, **part)


def test_workers_forked_after_requests_of_the_main_process_give_the_same_batches(server, folder):
    expected = batches(data(folder / "set"))
    options = data(f"{server.url}/set")
    for workers, first in ((0, 0), (2, 0), (1, 1)):
        for one, two in zip(expected[first:], batches(options, workers=workers, first=first), strict=True):
            assert torch.equal(one.clips, two.clips)
    for one, *parts in zip(expected, *(batches(options, rank=rank, world_size=2) for rank in (0, 1)), strict=True):
        assert torch.equal(one.clips, torch.cat([part.clips for part in parts]))


def test_a_fork_reads_while_its_parent_does(server, folder):
    url, options = f"{server.url}/random.bin", StorageConfig(**FAST)
    content = (folder / "random.bin").read_bytes()
    assert storage.read_file(url, options) == content
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_read_or_exit, args=(url, options, content)) for _ in range(3)]
    for child in children:
        child.start()
    assert storage.read_file(url, options) == content
    for child in children:
        child.join(20)
        assert child.exitcode == 0


def _read_or_exit(url, options, content):
    os._exit(0 if storage.read_file(url, options) == content else 1)


# ---------------------------------------------------------------- credentials


def test_addresses_are_shown_without_credentials():
    assert public(f"https://me:{SECRET}@host/a.mp4") == "https://host/a.mp4"
    assert public(f"https://host/a.mp4?X-Amz-Signature={SECRET}&x=1") == "https://host/a.mp4?…"
    assert public(f"https://host/a.tar?sig={SECRET}#3/key.mp4") == "https://host/a.tar?…#3/key.mp4"
    for path in ("/data/a?b.mp4", "s3://bucket/a?b #1@x.mp4", "https://host/a@b.mp4", "hf://datasets/me/x@main/a.mp4"):
        assert public(path) == path
        assert not has_credentials(path)


@pytest.mark.parametrize("address", [f"https://me:{SECRET}@host/set", f"http://host/a.mp4?sig={SECRET}"])
def test_addresses_with_credentials_are_refused_in_configurations(address):
    with pytest.raises(ConfigError, match=r"datasets.0: http.*would be written to config.yaml") as error:
        data(address)
    assert SECRET not in str(error.value)


def test_signatures_in_lists_are_used_and_never_shown(server, folder, tmp_path, caplog):
    (tmp_path / "list.txt").write_text(f"{server.url}/set/a.mp4?sig={SECRET}\n{server.url}/gone.mp4?sig={SECRET}\n")
    options = data(tmp_path / "list.txt")
    dataset = video_dataset.Dataset(options, EvalTransform(32), on_error="replace")
    with caplog.at_level(logging.DEBUG, "tubelet"):
        server.faults = ["ok", 503]
        good, replaced = dataset[Draw(0, 0, 0, 0)], dataset[Draw(0, 0, 1, 0)]
        for path in ("a.mp4", "gone.mp4"):
            assert any(r.path.endswith(f"{path}?sig={SECRET}") for r in server.requests)
        from tubelet.data.collate import collate

        bad_files = BadFiles(tmp_path / "bad_files.txt", 1.0)
        bad_files.record(collate([good, replaced], 0))
        server.always = 403
        with pytest.raises(VideoError, match=r"HTTP status 403") as error:
            video_dataset.Dataset(options, EvalTransform(32))[Draw(0, 0, 0, 0)]
    written = (tmp_path / "bad_files.txt").read_text()
    assert f"{server.url}/gone.mp4?…\t" in written
    for text in (written, caplog.text, str(error.value), repr(error.value), good.path, repr(replaced)):
        assert SECRET not in text
    assert error.value.__cause__ is None or SECRET not in str(error.value.__cause__)
