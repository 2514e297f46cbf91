"""Shards that the library `webdataset` has written, read in any order, against its own reading."""

import io
import json
import os
import tarfile
import time

import numpy as np
import pytest
import torch

from tests.data.batches import load
from tubelet.config import ConfigError
from tubelet.data import AugConfig, DataConfig, Draw, VideoError, shard_index
from tubelet.data.decoders import open_video, read_frames
from tubelet.data.shard_list import expand
from tubelet.data.storage import StorageConfig
from tubelet.data.transforms import EvalTransform, TrainTransform
from tubelet.data.webdataset import Dataset

webdataset = pytest.importorskip("webdataset")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tubelet" / "shards"


@pytest.fixture(scope="session")
def shards(videos, tmp_path_factory):
    """Two shards with the six videos of `videos`, classes, texts and JSON."""
    folder = tmp_path_factory.mktemp("shards")
    files = sorted(videos.rglob("*.mp4"))
    with webdataset.ShardWriter(str(folder / "train-%06d.tar"), maxcount=4, verbose=0) as writer:
        for number, path in enumerate(files):
            writer.write(
                {
                    "__key__": f"dir.x/sample {number}" if number == 3 else f"{number:03d}",
                    "mp4": path.read_bytes(),
                    "cls": number % 3,
                    "txt": f"Größe {number}",
                    "json": {"score": number / 2, "label": 10 + number},
                }
            )
    return folder


def options(*entries, video=None, label="cls", targets=None, **changed):
    form = {"name": "webdataset", "video": video, "label": label, "targets": targets or {}}
    raw = {"sampling_rate": 2, "num_frames": 4, "crop_size": 32} | changed
    return DataConfig(datasets=[str(entry) for entry in entries], format=form, **raw)


def read(*entries, **changed):
    return Dataset(options(*entries, **changed), EvalTransform(32), on_error="raise")


def test_samples_are_those_that_the_library_reads(shards):
    dataset = read(shards, targets={"caption": "txt", "score": "json.score"})
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert len(dataset) == len(theirs) == 6
    for index, sample in enumerate(theirs):
        path = dataset.paths[index]
        assert path.endswith(f"/{sample['__key__']}.mp4")
        assert path.startswith(sample["__url__"] + "#")
        expected = {"label": sample["cls"], "caption": sample["txt"], "score": sample["json"]["score"]}
        assert dataset.targets(index) == expected
        video, their_video = dataset.open(path), open_video(io.BytesIO(sample["mp4"]), "pyav")
        numbers = np.arange(video.num_frames)
        assert video.num_frames == their_video.num_frames
        np.testing.assert_array_equal(read_frames(video, numbers, ""), read_frames(their_video, numbers, ""))


def test_clips_are_those_of_the_plain_files(shards, videos, tmp_path):
    from tubelet.data import video_dataset

    data = options(shards)
    plain = data.model_copy(update={"datasets": [str(videos)]})
    transform = TrainTransform(AugConfig(), 32)
    packed, files = Dataset(data, transform, seed=5), video_dataset.Dataset(plain, transform, seed=5)
    cached = Dataset(data.model_copy(update={"cache": str(tmp_path / "frames")}), transform, seed=5)
    for index in range(6):
        draw = Draw(0, 3, index, 0)
        for dataset in (packed, cached, cached):
            assert torch.equal(dataset[draw].clips, files[draw].clips)
            assert torch.equal(dataset[draw].frames, files[draw].frames)
    assert len(list((tmp_path / "frames").iterdir())) == 6


def batches(data, **part):
    dataset = Dataset(data, TrainTransform(AugConfig(auto_augment=True), 32), seed=7, on_error="replace")
    return load(dataset, batch_size=4, last=5, **part)


def test_batches_do_not_depend_on_workers_processes_or_a_resume(shards):
    data = options(shards)
    straight = batches(data)
    for workers, first in ((1, 0), (2, 0), (2, 3)):
        for one, two in zip(straight[first:], batches(data, workers=workers, first=first), strict=True):
            assert torch.equal(one.clips, two.clips)
            assert (one.paths, one.labels.tolist()) == (two.paths, two.labels.tolist())
    halves = [batches(data, rank=rank, world_size=2) for rank in (0, 1)]
    for one, *parts in zip(straight, *halves, strict=True):
        assert torch.equal(one.clips, torch.cat([part.clips for part in parts]))


def test_labels_from_json_or_none(shards):
    assert read(shards).labels == [0, 1, 2, 0, 1, 2]
    assert read(shards, label="json.label").labels == [10, 11, 12, 13, 14, 15]
    assert read(shards, label=None).labels == [-1] * 6
    with pytest.raises(
        ConfigError, match=r"train-000000.tar: the label of 000, the field none of the json file, is no integer"
    ):
        read(shards, label="json.none")


def test_patterns_folders_and_lists_name_shards(shards, tmp_path):
    storage = StorageConfig()
    both = [str(shards / f"train-00000{number}.tar") for number in (0, 1)]
    (tmp_path / "list.txt").write_text(f"{shards}/train-{{000000..000001}}.tar\n\n")
    for entry in (str(shards), f"{shards}/train-{{000000..000001}}.tar", f"{shards}/{{train-000000,train-000001}}.tar",
                  f"file://{shards}/train-00000{{0..1}}.tar", str(tmp_path / "list.txt")):  # fmt: skip
        assert expand(entry, storage) == both
    assert expand("a-{08..11}-{x,y}.tar", storage)[2:4] == ["a-09-x.tar", "a-09-y.tar"]
    assert read(both[1], both[0]).sizes == [2, 4]
    with pytest.raises(ConfigError, match="no such folder"):
        expand(str(tmp_path / "gone"), storage)
    with pytest.raises(ConfigError, match=r"no \.tar file"):
        expand(str(tmp_path), storage)


def test_the_index_is_made_once_and_follows_the_shard(shards, tmp_path, cache, monkeypatch):
    shard = tmp_path / "x.tar"
    shard.write_bytes((shards / "train-000000.tar").read_bytes())
    paths = list(read(shard).paths)
    assert len(list(cache.rglob("*.index"))) == 1
    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "scan", lambda *_: pytest.fail("indexed again"))
        assert list(read(shard).paths) == paths
    for damaged in cache.rglob("*.index"):
        damaged.write_bytes(damaged.read_bytes()[:50])
    assert list(read(shard).paths) == paths
    shard.write_bytes((shards / "train-000001.tar").read_bytes())
    assert len(read(shard)) == 2
    beside = shard_index.dump(shard_index.scan(str(shard), "cls", StorageConfig()), shard.stat().st_size, "cls")
    (tmp_path / "x.tar.index").write_bytes(beside)
    for cached in cache.rglob("*.index"):
        cached.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(shard_index, "scan", lambda *_: pytest.fail("the index beside the shard was not used"))
        assert len(read(shard)) == 2


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_names_follow_the_rules_of_the_library(videos, tmp_path):
    video = (videos / "a.mp4").read_bytes()
    members = [
        ("__meta__", b"skipped"),
        ("./a.b/one.left.MP4", video),
        ("./a.b/one.json", json.dumps({"a": 1}).encode()),
        ("no extension", b""),
        ("two.txt", b"without video"),
        ("x" * 300 + ".mp4", video),  # a long name has headers of its own
        ("three.mkv", video),
        ("three.cls", b"5\n"),
    ]
    shard = write_tar(tmp_path / "x.tar", members)
    dataset = read(shard)
    assert [path.partition("#")[2] for path in dataset.paths] == [
        "0/./a.b/one.left.mp4", f"2/{'x' * 300}.mp4", "3/three.mkv"
    ]  # fmt: skip
    assert dataset.labels == [-1, -1, 5]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(str(shard), shardshuffle=False)]
    assert keys == ["./a.b/one", "two", "x" * 300, "three"]
    assert len(read(shard, video="left.mp4")) == 1
    assert dataset[Draw(0, 0, 2, 0)].clips.shape == (1, 3, 4, 32, 32)
    with pytest.raises(VideoError, match="x.tar#3/three.mkv: data.format.targets: the sample has no file .txt"):
        read(shard, targets={"caption": "txt"})[Draw(0, 0, 2, 0)]


def test_shards_that_cannot_be_used_are_named(shards, tmp_path, videos):
    content = (shards / "train-000000.tar").read_bytes()
    cut, damaged = tmp_path / "cut.tar", tmp_path / "damaged.tar"
    cut.write_bytes(content[: len(content) // 2])
    with tarfile.open(shards / "train-000000.tar") as tar:
        third = tar.getmembers()[6].offset
    damaged.write_bytes(content[:third] + b"\xff" * 512 + content[third + 512 :])
    (tmp_path / "text.tar").write_text("no archive")
    for name, reason in (
        ("cut", "unexpected end"),
        ("damaged", f"cut off at byte {third}"),
        ("text", "truncated header"),
    ):
        with pytest.raises(ConfigError, match=rf"1 of 2 shards cannot be used.*\n.*{name}.tar: .*{reason}"):
            read(f"{{{shards}/train-000001,{tmp_path}/{name}}}.tar")
    twice = write_tar(tmp_path / "twice.tar", [("a.mp4", b""), ("a.mp4", b"")])
    with pytest.raises(ConfigError, match="the key a has two files .mp4"):
        read(twice)
    with pytest.raises(ConfigError, match="no sample has a video"):
        read(shards, video="avi")


def test_a_damaged_video_in_a_shard_is_replaced_and_named(videos, broken_video, tmp_path):
    members = [("a.mp4", (videos / "a.mp4").read_bytes()), ("b.mp4", open(broken_video, "rb").read())]
    data = options(write_tar(tmp_path / "x.tar", members))
    dataset = Dataset(data, EvalTransform(32), on_error="replace")
    sample = dataset[Draw(0, 0, 1, 0)]
    assert sample.path.endswith("x.tar#0/a.mp4")
    assert [file.path for file in sample.bad] == [f"{tmp_path}/x.tar#1/b.mp4"]
    assert "cannot" in sample.bad[0].reason


def test_a_shard_that_was_cut_off_between_two_files_is_named(shards, tmp_path):
    with tarfile.open(shards / "train-000000.tar") as tar:
        third = tar.getmembers()[6].offset
    (tmp_path / "cut.tar").write_bytes((shards / "train-000000.tar").read_bytes()[:third])
    with pytest.raises(ConfigError, match=f"cut off at byte {third}"):
        read(tmp_path / "cut.tar")


def test_a_label_beyond_64_bits_is_named(tmp_path):
    with pytest.raises(ConfigError, match="the label of a, the file, is no integer"):
        read(write_tar(tmp_path / "a.tar", [("a.mp4", b""), ("a.cls", b"9" * 30)]))


def test_the_index_beside_a_shard_that_was_written_again_is_not_used(tmp_path, videos):
    content = (videos / "a.mp4").read_bytes()
    shard = write_tar(tmp_path / "a.tar", [("a.mp4", content), ("a.cls", b"1")])
    index = shard_index.scan(str(shard), "cls", StorageConfig())
    (tmp_path / "a.tar.index").write_bytes(shard_index.dump(index, shard.stat().st_size, "cls"))
    assert list(read(shard).labels) == [1]
    size = shard.stat().st_size
    write_tar(shard, [("a.mp4", content), ("a.cls", b"2")])
    os.utime(shard, (time.time() + 10, time.time() + 10))
    assert shard.stat().st_size == size
    assert list(read(shard).labels) == [2]
