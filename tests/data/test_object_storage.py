"""S3 on a real server (moto's), directly and through a proxy that breaks requests."""

import itertools

import numpy as np
import pytest
import torch

from tests.data.batches import load
from tests.data.servers import Server
from tubelet.config import ConfigError, check
from tubelet.data import AugConfig, DataConfig, Draw, VideoError, image_dataset, storage, video_dataset, webdataset
from tubelet.data.storage import StorageConfig, StorageError
from tubelet.data.transforms import EvalTransform, TrainTransform

s3fs = pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")

FAST = {"retries": 3, "timeout": 5, "backoff": 0.01}
SECRET = "c2VjcmV0"  # noqa: S105


@pytest.fixture(scope="module")
def bucket(videos):
    """A bucket with the videos, a list, an image, and the videos in two shards; and its proxy."""
    server = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    with (
        pytest.MonkeyPatch.context() as patch,
        Server(upstream="http://{}:{}".format(*server.get_host_and_port())) as proxy,
    ):
        environment = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in {**environment, "AWS_ENDPOINT_URL": proxy.url}.items():
            patch.setenv(name, value)
        patch.delenv("AWS_PROFILE", raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        files = s3fs.S3FileSystem()
        files.mkdir("data")
        for path in sorted(videos.rglob("*.mp4")):
            files.put(str(path), f"data/videos/{path.relative_to(videos)}")
        files.pipe("data/list.txt", b"videos/a.mp4 1\ns3://data/videos/b.mp4 2\n")
        files.pipe("data/videos/.hidden/x.mp4", b"")
        files.pipe("data/random.bin", np.random.default_rng(0).bytes(2_000_000))
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def proxy(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bucket.reset()
    return bucket


def data(*entries, **changed):
    raw = {"sampling_rate": 2, "num_frames": 4, "crop_size": 32, "storage": FAST} | changed
    return check({"datasets": [str(entry) for entry in entries], **raw}, DataConfig, "test")


@pytest.fixture
def shards(proxy, videos, tmp_path):
    """Folder of two local shards, which are also in the bucket."""
    writers = pytest.importorskip("webdataset")
    with writers.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=3, verbose=0) as writer:
        for number, path in enumerate(sorted(videos.rglob("*.mp4"))):
            writer.write({"__key__": path.stem, "mp4": path.read_bytes(), "cls": number})
    s3fs.S3FileSystem().put(str(tmp_path / "*.tar"), "data/shards/")
    return tmp_path


def test_the_batches_are_those_of_local_files_for_any_workers_and_processes(proxy, videos, shards):
    transform, options = TrainTransform(AugConfig(), 32), {"seed": 7, "on_error": "replace"}
    form = {"format": {"name": "webdataset"}}
    kinds = [
        (video_dataset, {}, "s3://data/videos", videos),
        (video_dataset, {}, "s3://data/list.txt", None),
        (webdataset, form, "s3://data/shards/train-{000000..000001}.tar", shards),
        (webdataset, form, "s3://data/shards", shards),
    ]
    for module, changed, remote, local in kinds:
        dataset = module.Dataset(data(remote, **changed), transform, **options)
        straight = load(dataset)
        if local is not None:
            plain = module.Dataset(data(local, **changed), transform, **options)
            assert list(dataset.labels) == list(plain.labels)
            for one, two in zip(straight, load(plain), strict=True):
                assert torch.equal(one.clips, two.clips)
        for workers, first in ((2, 0), (1, 2)):
            for one, two in zip(straight[first:], load(dataset, workers=workers, first=first), strict=True):
                assert torch.equal(one.clips, two.clips)
                assert one.paths == two.paths
        halves = [load(dataset, rank=rank, world_size=2) for rank in (0, 1)]
        for one, *parts in zip(straight, *halves, strict=True):
            assert torch.equal(one.clips, torch.cat([part.clips for part in parts]))


def test_a_shard_is_indexed_from_its_headers_and_a_clip_reads_only_its_video(proxy, tmp_path, videos):
    from tests.data.test_webdataset import write_tar

    rng = np.random.default_rng(0)
    video = (videos / "a.mp4").read_bytes()
    members = itertools.chain.from_iterable(
        [(f"{i:03d}.cls", b"%d" % i), (f"{i:03d}.mp4", video), (f"{i:03d}.bin", rng.bytes(400_000))] for i in range(20)
    )
    write_tar(tmp_path / "big.tar", members)
    s3fs.S3FileSystem().put(str(tmp_path / "big.tar"), "data/big.tar")
    proxy.reset()
    options = data("s3://data/big.tar", format={"name": "webdataset"})
    dataset = webdataset.Dataset(options, EvalTransform(32))
    assert list(dataset.labels) == list(range(20))
    assert proxy.bytes_sent < 2_000_000 < (tmp_path / "big.tar").stat().st_size // 4
    proxy.reset()
    assert dataset[Draw(0, 0, 17, 0)].clips.shape == (1, 3, 4, 32, 32)
    assert [request.sent for request in proxy.requests] == [len(video)]
    proxy.reset()
    assert list(webdataset.Dataset(options, EvalTransform(32)).labels) == list(range(20))
    assert len(proxy.requests) <= 2  # the index is in the cache; only the version of the shard is asked for


def test_images_have_the_classes_of_their_folders(proxy, tmp_path):
    from PIL import Image

    for name in ("dog", "cat"):
        Image.new("RGB", (40, 40), name == "dog" and "red" or "blue").save(tmp_path / "x.png")
        s3fs.S3FileSystem().put(str(tmp_path / "x.png"), f"data/images/{name}/x.png")
    dataset = image_dataset.Dataset(data("s3://data/images/", num_frames=1, sampling_rate=1), EvalTransform(32))
    assert (dataset.classes, list(dataset.labels)) == (["cat", "dog"], [0, 1])
    assert dataset[Draw(0, 0, 1, 0)].clips[0, :, 0, 0, 0].tolist() == [255, 0, 0]


SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@pytest.mark.parametrize("fault", [503, 500, "reset", "truncated", "slow"])
def test_passing_faults_are_retried(proxy, fault):
    options = StorageConfig(**{**FAST, "timeout": 1})
    expected = storage.read_file("s3://data/random.bin", options)
    part = storage.open_part("s3://data/random.bin", options)
    proxy.body, proxy.faults = SLOW_DOWN, [fault, fault]
    assert part.read() == expected
    assert not proxy.faults


EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


@pytest.mark.parametrize(("fault", "body", "reason", "requests"), [
    (503, SLOW_DOWN, r"HTTP status 503 \(SlowDown\), 4 attempts", 4),
    (400, EXPIRED, r"HTTP status 400 \(ExpiredToken\)", 1),
    (403, DENIED, r"HTTP status 403 \(AccessDenied\)", 1),
    ("truncated", b"", r"\w+: .*, 4 attempts", 4),
    pytest.param("slow", b"", "no answer within 1 s, 4 attempts", 4, marks=pytest.mark.slow),  # waits for 8 s
])  # fmt: skip
def test_lasting_faults_end_with_the_reason(proxy, videos, fault, body, reason, requests):
    options = data("s3://data/videos/a.mp4", videos / "b.mp4", storage={**FAST, "timeout": 1})
    dataset = video_dataset.Dataset(options, EvalTransform(32), on_error="replace")
    storage.status("s3://data/videos/a.mp4", options.storage)
    proxy.reset()
    proxy.body, proxy.faults, proxy.always = body, ["ok"], fault  # the first request asks for the size
    sample = dataset[Draw(0, 0, 0, 0)]
    assert [file.path for file in sample.bad] == ["s3://data/videos/a.mp4"]
    with pytest.raises(StorageError, match=f"^{reason}$"):
        storage.open_part("s3://data/videos/a.mp4", options.storage, 0, 100).read()
    assert SECRET not in sample.bad[0].reason
    assert len(proxy.requests) == 1 + 2 * requests


def test_what_does_not_exist_is_an_error(proxy):
    for entry in ("s3://data/gone", "s3://data/gone.txt", "s3://gone/videos"):
        with pytest.raises(ConfigError, match=f"'{entry}': (no such file|HTTP status 404.*|there is nothing.*)"):
            video_dataset.Dataset(data(entry), EvalTransform(32))
    with pytest.raises(VideoError, match=r"gone.mp4: (no such file|HTTP status 404)"):
        video_dataset.Dataset(data("s3://data/gone.mp4"), EvalTransform(32))[Draw(0, 0, 0, 0)]


def test_a_missing_client_is_named(monkeypatch):
    import fsspec

    def missing(*_, **__):
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(ConfigError, match="gs://bucket/a: Please install gcsfs. Run `pip install gcsfs`"):
        storage.status("gs://bucket/a", StorageConfig())
