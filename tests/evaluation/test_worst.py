"""The worst images against sorting all of them."""

import hypothesis
import hypothesis.strategies as st

from infmae_jax.evaluation.worst import Worst


@hypothesis.given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0])), st.integers(1, 5))
def test_worst_are_the_first_when_sorted_and_of_equal_ones_the_earlier(qualities, most):
    worst = Worst(most)
    for number, quality in enumerate(qualities):
        worst.add(quality, (object(), number))  # not comparable
    numbers = [number for _, number in worst.items()]
    assert numbers == sorted(range(len(qualities)), key=lambda n: (qualities[n], n))[:most]
