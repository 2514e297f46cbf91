import os

import pytest
import torch

from tubelet.probing.cache import FeatureCache


def test_tokens_come_back_in_any_order_from_several_files(tmp_path):
    videos = [tmp_path / f"{name}.mp4" for name in "abcde"]
    for video in videos:
        video.write_bytes(b"x")
    paths = [str(video) for video in videos]
    tokens = torch.randn(5, 1, 1, 3, 4)
    cache = FeatureCache(tmp_path / "cache", "encoder and clips")
    cache.add(paths[:2], tokens[:2])
    cache.add(paths[2:], tokens[2:])

    reopened = FeatureCache(tmp_path / "cache", "encoder and clips")
    assert all(path in reopened for path in paths)
    order = [3, 0, 4, 0]
    stored = reopened.open([paths[i] for i in order])
    assert torch.equal(stored.load(), tokens[order])
    assert torch.equal(stored[torch.tensor([2, 0, 1])], tokens[[4, 3, 0]])
    assert (len(stored), stored.nbytes) == (4, 4 * 3 * 4 * 4)
    assert torch.equal(reopened.open([paths[1]]).load(lambda x: x.mean(3)), tokens[[1]].mean(3))


def test_bfloat16_tokens_are_read_alike_from_disk_and_from_memory(tmp_path):
    paths = [str(tmp_path / f"{i}.mp4") for i in range(6)]
    tokens = torch.randn(6, 2, 1, 5, 4).bfloat16()
    cache = FeatureCache(tmp_path / "cache", "key")
    cache.add(paths[:4], tokens[:4])
    cache.add(paths[4:], tokens[4:])
    stored = cache.open(paths)
    rows = torch.tensor([5, 1, 1, 4])
    assert torch.equal(stored[rows], stored.load()[rows])
    assert stored[rows].dtype == torch.bfloat16


def test_another_key_or_a_changed_video_is_not_found(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"x")
    FeatureCache(tmp_path / "cache", "one").add([str(video)], torch.zeros(1, 1, 1, 3, 4))
    assert str(video) in FeatureCache(tmp_path / "cache", "one")
    assert str(video) not in FeatureCache(tmp_path / "cache", "another")
    video.write_bytes(b"longer")
    assert str(video) not in FeatureCache(tmp_path / "cache", "one")


def test_names_that_are_not_utf8(tmp_path):
    video = os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4")
    try:
        with open(video, "wb") as file:
            file.write(b"x")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    path = os.fsdecode(video)
    FeatureCache(tmp_path / "cache", "key").add([path], torch.ones(1, 1, 1, 3, 4))
    reopened = FeatureCache(tmp_path / "cache", "key")
    assert path in reopened
    assert torch.equal(reopened.open([path]).load(), torch.ones(1, 1, 1, 3, 4))
