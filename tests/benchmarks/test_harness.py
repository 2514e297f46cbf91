import time

import pytest
import torch

from benchmarks import loader
from benchmarks.harness import Row, table, time_alternately


def test_ratio_is_the_speedup_over_the_peer():
    calls = []

    def side(name, duration):
        return lambda: (calls.append(name), time.sleep(duration))

    timing = time_alternately(side("ours", 0.01), side("peer", 0.03), repeats=4)
    assert calls == ["ours", "peer"] + ["ours", "peer", "peer", "ours"] * 2
    assert timing.ratio == pytest.approx(3, rel=0.5)
    assert timing.ours < timing.peer


def test_table_shows_which_goals_are_reached():
    text = table([Row("a", "1 ms", "2 ms", 2.0, 1.5), Row("b", "1 ms", "1 ms", 1.0, 1.5), Row("c", "5 GiB")])
    header, a, b, c = text.splitlines()
    assert header.split() == ["ours", "peer", "ours", "/", "peer", "goal"]
    assert "2.00x" in a
    assert "reached" in a
    assert "MISSED" in b
    assert c.split() == ["c", "5", "GiB", "-", "-", "-"]


def test_both_loaders_give_equivalent_batches(tmp_path):
    paths = [loader.write_video(tmp_path / f"{i}.mp4", seed=i, num_frames=80) for i in range(loader.BATCH_SIZE)]
    (ours,), (peer,) = list(loader.our_batches(paths, 0)), list(loader.peer_batches(paths, 0))
    assert ours.shape == peer.shape == (loader.BATCH_SIZE, 3, 16, 224, 224)
    assert ours.dtype == peer.dtype == torch.float32
    # The same videos with other crops, so only the colors of the batch agree.
    torch.testing.assert_close(ours.mean((0, 2, 3, 4)), peer.mean((0, 2, 3, 4)), atol=0.15, rtol=0)
    torch.testing.assert_close(ours.std((0, 2, 3, 4)), peer.std((0, 2, 3, 4)), atol=0.15, rtol=0)
