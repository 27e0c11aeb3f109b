import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from infmae_jax.evaluation.classification import knn_predict


def brute_force(train, labels, test, neighbors):
    mean, std = train.mean(0), train.std(0)
    unit = [((x - mean) / std) for x in (train, test)]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in unit]
    votes = [labels[np.argsort(-row, kind="stable")[:neighbors]] for row in unit[1] @ unit[0].T]
    return [int(np.bincount(v).argmax()) for v in votes]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), neighbors=st.integers(1, 30), classes=st.integers(2, 5))
def test_equals_brute_force(seed, neighbors, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, 40).astype(np.int32)
    train, test = rng.normal(5, 2, (40, 7)), rng.normal(5, 2, (9, 7))
    assert knn_predict(train, labels, test, neighbors).tolist() == brute_force(train, labels, test, neighbors)


def test_constant_features_and_few_images():
    train = np.array([[1.0, 7.0], [1.1, 7.0], [-1.0, 7.0]])
    assert knn_predict(train, np.array([0, 0, 1], np.int32), train, neighbors=20).tolist() == [0, 0, 0]
    assert knn_predict(train, np.array([0, 0, 1], np.int32), train, neighbors=1).tolist() == [0, 0, 1]
