import numpy as np
import pytest

from tubelet.data.permutation import MAX_STORED, ComputedOrder, random_order
from tubelet.runtime.seeds import Purpose


def computed(length, seed=0):
    return ComputedOrder(length, np.random.default_rng(seed))


@pytest.mark.parametrize("length", [2, 3, 4, 5, 16, 17, 1000, 4097, 300_001])
def test_a_computed_order_has_each_item_once(length):
    np.testing.assert_array_equal(np.sort(computed(length)[np.arange(length)]), np.arange(length))


def test_a_part_is_that_of_the_whole():
    whole = computed(5000)[np.arange(5000)]
    some = np.array([4999, 0, 17, 17, 3])
    np.testing.assert_array_equal(computed(5000)[some], whole[some])


def test_computed_orders_look_random():
    """Neighbors, the same position under other seeds, and position against item are uncorrelated (5 sigma)."""
    length = 40_000
    orders = np.stack([computed(length, seed)[np.arange(length)] for seed in range(8)])
    limit = 5 / np.sqrt(length)
    correlations = np.corrcoef(np.concatenate([orders, np.roll(orders, 1, axis=1), np.arange(length)[None]]))
    assert np.abs(correlations[np.triu_indices_from(correlations, 1)]).max() < limit
    # Items of each sixteenth of the positions are spread evenly over sixteen bins: chi-squared, 225 degrees of freedom.
    table = np.histogram2d(np.arange(length), orders[0], bins=16)[0]
    expected = length / 256
    assert 140 < ((table - expected) ** 2 / expected).sum() < 340


def test_short_orders_are_those_of_numpy_and_long_ones_take_no_memory():
    assert isinstance(random_order(MAX_STORED, 1, Purpose.PASS_ORDER, 2), np.ndarray)
    long = random_order(10**9, 1, Purpose.PASS_ORDER, 2)
    items = long[np.arange(1000)]
    assert len(set(items.tolist())) == 1000
    assert (items >= 0).all()
    assert (items < 10**9).all()
    assert not np.array_equal(items, random_order(10**9, 1, Purpose.PASS_ORDER, 3)[np.arange(1000)])
