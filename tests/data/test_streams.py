from collections import Counter

import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data.streams import SampleStream


def flat(stream, steps):
    return [draw for step in steps for draw in stream.draws(step)]


def test_each_sample_once_an_epoch_and_orders_differ():
    stream = SampleStream([5, 8], None, batch_size=4, seed=3)
    draws = flat(stream, range(13))  # 52 draws: four passes
    passes = [[draw.index for draw in draws[i : i + 13]] for i in range(0, 52, 13)]
    assert all(sorted(one) == list(range(13)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert [draw.epoch for draw in draws] == [i // 13 for i in range(52)]
    assert [draw.position for draw in draws] == [0, 1, 2, 3] * 13


def test_a_step_needs_no_other_step():
    together = SampleStream([50, 7, 300], [0.2, 0.5, 0.3], batch_size=6, seed=1)
    draws = {step: together.draws(step) for step in range(300)}
    for step in (299, 0, 123, 5):
        assert SampleStream([50, 7, 300], [0.2, 0.5, 0.3], batch_size=6, seed=1).draws(step) == draws[step]
    assert SampleStream([50, 7, 300], [0.2, 0.5, 0.3], batch_size=6, seed=2).draws(0) != draws[0]


def test_batches_larger_than_the_set():
    draws = SampleStream([3], None, batch_size=10, seed=0).draws(1)  # draws 10 to 19 of the stream
    assert [draw.epoch for draw in draws] == [3, 3, 4, 4, 4, 5, 5, 5, 6, 6]


def test_weights_are_met_exactly_in_each_pass():
    sizes, weights = [100, 10, 30], [0.1, 0.6, 0.3]
    stream = SampleStream(sizes, weights, batch_size=14, seed=0)  # a pass is 140 draws
    for number in range(3):
        draws = flat(stream, range(10 * number, 10 * number + 10))
        source = np.digitize([draw.index for draw in draws], [100, 110])
        np.testing.assert_array_equal(np.bincount(source), [14, 84, 42])
    everything = flat(stream, range(100))
    counts = Counter((draw.epoch, draw.index) for draw in everything)
    assert max(counts.values()) == 1  # no epoch of a source shows a sample twice
    small = Counter(draw.index for draw in everything if 100 <= draw.index < 110)
    assert max(small.values()) - min(small.values()) <= 1


def test_a_weight_of_zero_excludes_a_source_and_one_too_small_is_an_error():
    stream = SampleStream([4, 4], [1.0, 0.0], batch_size=8, seed=0)
    assert {draw.index for draw in flat(stream, range(5))} == {0, 1, 2, 3}
    with pytest.raises(ConfigError, match="data.datasets_weights: .* would never be drawn"):
        SampleStream([4, 4], [1.0, 1e-3], batch_size=8, seed=0)


def test_without_shuffling_the_order_is_that_of_the_files():
    stream = SampleStream([2, 3], None, batch_size=5, seed=0, shuffle=False)
    assert [draw.index for draw in stream.draws(7)] == [0, 1, 2, 3, 4]


def test_draws_are_those_of_every_version():
    stream = SampleStream([5, 8, 30], [0.2, 0.5, 0.3], batch_size=6, seed=3)
    draws = [[(draw.index, draw.epoch) for draw in stream.draws(step)] for step in (0, 9)]
    assert draws == [
        [(8, 2), (6, 0), (12, 1), (4, 1), (9, 0), (16, 0)],
        [(34, 0), (8, 4), (31, 0), (2, 3), (6, 4), (15, 0)],
    ]
