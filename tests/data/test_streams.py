from collections import Counter

import numpy as np
import pytest

from tubelet.config import ConfigError
from tubelet.data import Draw, permutation
from tubelet.data.rows import Numbers
from tubelet.data.streams import SampleStream
from tubelet.runtime.seeds import Purpose, numpy_generator


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


def one_by_one(stream, step):
    """The draws of a step, each computed alone from stored orders: how `draws` was written first."""
    draws = []
    for position in range(stream.batch_size):
        number, offset = divmod(step * stream.batch_size + position, stream.pass_length)
        order = numpy_generator(stream.seed, Purpose.PASS_ORDER, number).permutation(stream.pass_length)
        source = int(np.searchsorted(np.cumsum(stream.quotas), order[offset], side="right"))
        rank_in_quota = order[offset] - stream.quotas[:source].sum()
        epoch, rank = divmod(int(number * stream.quotas[source] + rank_in_quota), int(stream.sizes[source]))
        items = numpy_generator(stream.seed, Purpose.SOURCE_ORDER, epoch, source).permutation(stream.sizes[source])
        draws.append(Draw(step, epoch, int(stream.sizes[:source].sum() + items[rank]), position))
    return draws


@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [1.0, 0.0, 3.0]])
def test_draws_are_those_computed_one_by_one(weights):
    stream = SampleStream([50, 7, 31], weights, batch_size=23, seed=4)
    for step in range(30):
        assert stream.draws(step) == one_by_one(stream, step)


def test_long_sources_are_drawn_alike(monkeypatch):
    monkeypatch.setattr(permutation, "MAX_STORED", 6)
    stream = SampleStream([50, 7, 31], [0.2, 0.5, 0.3], batch_size=8, seed=4)
    counts = Counter((draw.epoch, draw.index) for draw in flat(stream, range(200)))
    assert max(counts.values()) == 1
    everything = flat(SampleStream([50, 38], None, batch_size=8, seed=4), range(11))
    assert sorted(draw.index for draw in everything) == list(range(88))


def by_duration(durations, weights=None, batch_size=10, seed=2, **options):
    ends = [Numbers(np.cumsum(of_source, dtype=float)) for of_source in durations]
    sizes = [len(of_source) for of_source in durations]
    return SampleStream(sizes, weights, batch_size, seed, cumulative_durations=ends, **options)


@pytest.mark.parametrize("clips", [1, 5])
def test_videos_are_drawn_in_proportion_to_their_duration(clips):
    durations = np.random.default_rng(0).lognormal(sigma=1.5, size=200)
    stream = by_duration([durations], batch_size=200 * clips, clips_per_sample=clips)
    expected = durations / durations.sum() * 200 * clips
    total = np.zeros(200)
    for step in range(50):
        drawn = np.bincount([draw.index for draw in stream.draws(step)], minlength=200)
        assert (np.abs(drawn - expected) < 1).all()  # of each pass: rounded down or up
        total += drawn
    assert np.abs(total / 50 - expected).max() < 0.2  # the offsets average out


def test_a_long_video_is_never_drawn_twice_for_the_same_clip():
    draws = flat(by_duration([[1.0, 500.0, 3.0, 0.1], [10.0] * 6]), range(100))
    assert max(Counter((draw.epoch, draw.index) for draw in draws).values()) == 1


def test_sources_have_the_weight_of_their_durations_or_the_given_one():
    durations = [[1.0] * 10, [30.0, 50.0, 10.0]]
    shares = [
        np.mean([draw.index >= 10 for draw in flat(by_duration(durations, weights), range(130))])
        for weights in (None, [3.0, 1.0])
    ]
    np.testing.assert_allclose(shares, [0.9, 0.25], atol=0.03)


def test_draws_by_duration_need_no_other_step():
    durations = [[1.0, 500.0, 3.0, 0.1], [10.0] * 6]
    stream = by_duration(durations)
    draws = [stream.draws(step) for step in range(20)]
    assert by_duration(durations).draws(13) == draws[13]
    assert by_duration(durations, seed=3).draws(13) != draws[13]
    in_order = by_duration(durations, shuffle=False, batch_size=10).draws(0)
    assert [draw.index for draw in in_order][:9] == sorted(draw.index for draw in in_order[:9])


def test_several_clips_of_a_sample_are_those_of_as_many_passes():
    stream = SampleStream([3, 5], None, batch_size=4, seed=0, clips_per_sample=6)
    assert stream.steps_per_pass == 12
    for number in range(2):
        draws = flat(stream, range(12 * number, 12 * number + 12))
        assert sorted((draw.index, draw.epoch) for draw in draws) == [
            (index, 6 * number + clip) for index in range(8) for clip in range(6)
        ]
    weighted = flat(SampleStream([3, 5], [0.5, 0.5], batch_size=4, seed=0, clips_per_sample=6), range(36))
    assert len({(draw.index, draw.epoch) for draw in weighted}) == len(weighted)
    assert sum(draw.index < 3 for draw in weighted) == len(weighted) // 2
