import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infmae_jax.evaluation import classification as metrics


@given(pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_measures_equal_counting(pairs):
    truth, predicted = np.array(pairs).T
    counts = metrics.confusion_counts(truth, predicted, 4)
    assert all(counts[t, p] == sum(pair == (t, p) for pair in pairs) for t in range(4) for p in range(4))
    assert metrics.top1(counts) == pytest.approx(np.mean(truth == predicted))
    shares = [np.mean(predicted[truth == c] == c) for c in range(4) if (truth == c).any()]
    assert metrics.balanced_accuracy(counts) == pytest.approx(np.mean(shares))
    assert np.isnan(metrics.class_accuracy(counts)).sum() == 4 - len(shares)


def test_summary():
    assert metrics.summary([0.5]) == {"mean": 0.5, "std": 0.0, "seeds": [0.5]}
    assert metrics.summary([0.4, 0.6])["std"] == pytest.approx(np.sqrt(0.02))
