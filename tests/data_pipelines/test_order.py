"""The order of records against its definition."""

import pickle
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from data_pipelines.order import RecordOrder

weights = st.lists(st.floats(0.01, 100), min_size=2, max_size=4)


@hypothesis.given(count=st.integers(1, 40), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 5))
@hypothesis.settings(deadline=None)
def test_every_epoch_holds_every_record_once(count, seed, epoch):
    order = RecordOrder([count], (), seed)
    assert sorted(order.indices(epoch * count, count)) == list(range(count))


@hypothesis.given(
    start=st.integers(0, 200), count=st.integers(0, 60), weights=st.lists(st.floats(0.1, 9), max_size=0) | weights
)
@hypothesis.settings(deadline=None)
def test_any_range_is_a_part_of_the_whole(start, count, weights):
    order = RecordOrder([7, 11, 3, 5][: max(1, len(weights))], weights, 1)
    whole = RecordOrder([7, 11, 3, 5][: max(1, len(weights))], weights, 1).indices(0, 260)
    np.testing.assert_array_equal(order.indices(start, count), whole[start : start + count])


@hypothesis.given(weights=weights, length=st.integers(1, 400))
@hypothesis.settings(deadline=None)
def test_shares_are_right_at_every_moment_and_sets_run_through_their_records(weights, length):
    counts = [3, 8, 5, 4][: len(weights)]
    indices = RecordOrder(counts, weights, 2).indices(0, length)
    starts = np.cumsum([0, *counts])
    for number, weight in enumerate(weights):
        own = indices[(indices >= starts[number]) & (indices < starts[number + 1])]
        assert abs(len(own) - length * weight / sum(weights)) <= len(weights)
        for epoch in range(len(own) // counts[number]):
            assert len(set(own[epoch * counts[number] : (epoch + 1) * counts[number]])) == counts[number]


def test_epochs_seeds_and_sets_have_orders_of_their_own():
    count = 30
    orders = [RecordOrder([count], (), seed).indices(epoch * count, count) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len({order.tobytes() for order in orders}) == 9
    mixed = RecordOrder([count, count], (1.0, 1.0), 0).indices(0, 2 * count)
    assert (mixed[mixed < count] != mixed[mixed >= count] - count).any()


def test_first_places_are_uniform():
    first = Counter(int(RecordOrder([8], (), seed).indices(0, 1)[0]) for seed in range(4000))
    # 500 expected, standard deviation 21.
    assert all(390 < first[index] < 610 for index in range(8))


def test_the_order_does_not_depend_on_what_was_asked_before_nor_on_pickling():
    order, fresh = RecordOrder([10], (), 3), RecordOrder([10], (), 3)
    for start in (95, 0, 42, 7, 99, 0):
        np.testing.assert_array_equal(order.indices(start, 6), pickle.loads(pickle.dumps(fresh)).indices(start, 6))


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_far_positions_are_exact(weights):
    order = RecordOrder([1000, 1000], weights, 0)
    far = order.indices(10**12, 50)
    np.testing.assert_array_equal(far[25:], order.indices(10**12 + 25, 25))
    assert far.min() >= 0 and far.max() < 2000
