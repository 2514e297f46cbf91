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
    assert torch.equal(reopened.read([paths[i] for i in order], lambda x: x), tokens[order])
    assert torch.equal(reopened.read([paths[1]], lambda x: x.mean(3)), tokens[[1]].mean(3))


def test_another_key_or_a_changed_video_is_not_found(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"x")
    FeatureCache(tmp_path / "cache", "one").add([str(video)], torch.zeros(1, 1, 1, 3, 4))
    assert str(video) in FeatureCache(tmp_path / "cache", "one")
    assert str(video) not in FeatureCache(tmp_path / "cache", "another")
    video.write_bytes(b"longer")
    assert str(video) not in FeatureCache(tmp_path / "cache", "one")
