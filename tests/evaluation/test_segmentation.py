"""Confusion counts, mIoU family and boundary F1 against their definitions, pixel by pixel."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infmae_jax.evaluation import segmentation

NAMES = ("background", "car", "person", "bike")
pixels = st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 255]), st.integers(0, 3)), min_size=1, max_size=60)


def defined(pairs, classes):
    """mIoU, mAcc, aAcc over `classes`, counted in sets of pixels; NaN where there is nothing."""
    labels, predicted = np.array(pairs).T
    predicted = np.where(labels == 255, 255, predicted)
    iou, recall = [], []
    for c in classes:
        both, either = (labels == c) & (predicted == c), (labels == c) | (predicted == c)
        iou.append(both.sum() / either.sum() if either.any() else np.nan)
        recall.append(both.sum() / (labels == c).sum() if (labels == c).any() else np.nan)
    chosen = np.isin(labels, classes)
    accuracy = (labels == predicted)[chosen].mean() if chosen.any() else np.nan
    return iou, recall, (np.nanmean(iou), np.nanmean(recall), accuracy)


def with_nan(value):
    return np.nan if value is None else value


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
@settings(deadline=None)
@given(pairs=pixels)
def test_scores_equal_their_definition(pairs):
    labels, predicted = np.array(pairs, np.uint8).T
    matrix = segmentation.confusion(labels, predicted, 4)
    assert matrix.dtype == np.int64
    assert all(matrix[t, p] == pairs.count((t, p)) for t in range(4) for p in range(4))
    found = segmentation.scores(matrix, NAMES)
    iou, recall, means = defined(pairs, [0, 1, 2, 3])
    for key, values in (("IoU", iou), ("recall", recall)):
        np.testing.assert_allclose([with_nan(row[key]) for row in found["classes"]], values)
    for part, values in ((found, means), (found["without_background"], defined(pairs, [1, 2, 3])[2])):
        np.testing.assert_allclose([with_nan(part[key]) for key in ("mIoU", "mAcc", "aAcc")], values)
    assert found["pixels"] == sum(label != 255 for label, _ in pairs)
    json.dumps(found, allow_nan=False)
    segmentation.table_text(found, "whole images")


def test_conventions_for_absent_classes():
    """car is right, person is predicted but absent, bike is in neither."""
    matrix = np.array([[6, 0, 2, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = segmentation.scores(matrix, NAMES)
    assert [row["IoU"] for row in found["classes"]] == [0.75, 1.0, 0.0, None]
    assert [row["recall"] for row in found["classes"]] == [0.75, 1.0, None, None]
    assert [row["share"] for row in found["classes"]] == [0.8, 0.2, 0.0, 0.0]
    assert found["mIoU"] == pytest.approx(1.75 / 3) and found["mAcc"] == 0.875 and found["aAcc"] == 0.8
    assert found["without_background"] == {"mIoU": 0.5, "mAcc": 1.0, "aAcc": 1.0}
    assert "without_background" not in segmentation.scores(matrix, NAMES, background=None)
    lines = segmentation.table_text(found, "sliding window 512, stride 341").splitlines()
    assert lines[4].split() == ["bike", "-", "-", "0.00"]
    assert "all classes: mIoU 58.33, mAcc 87.50, aAcc 80.00" in lines
    assert lines[-1] == "in per cent of 10 labelled pixels; sliding window 512, stride 341"


def test_counts_are_exact_where_float32_is_not():
    labels = np.ones((4200, 4200), np.uint8)
    labels[0, 0] = 255
    matrix = segmentation.confusion(labels, labels, 2)
    assert matrix.tolist() == [[0, 0], [0, 4200**2 - 1]] and 4200**2 - 1 > 2**24


def test_scores_of_nothing_and_of_huge_sums():
    empty = segmentation.scores(np.zeros((4, 4), np.int64), NAMES)
    assert empty["mIoU"] is None and empty["without_background"]["aAcc"] is None
    huge = segmentation.scores(np.diag([2**40 + 1, 2**40, 3, 0]), NAMES)
    assert huge["pixels"] == 2**41 + 4 and huge["mIoU"] == 1.0


@pytest.mark.parametrize("names, background", [(NAMES[:3], 0), (NAMES, 4), (NAMES, -1)])
def test_names_that_do_not_fit_are_refused(names, background):
    with pytest.raises(ValueError, match=r"\(4, 4\) does not fit"):
        segmentation.scores(np.zeros((4, 4), np.int64), names, background)


def slow_boundary_counts(labels, predicted, num_classes, tolerance):
    h, w = labels.shape
    predicted = np.where(labels == 255, 255, predicted)

    def boundary(classes, c):
        return [
            (y, x) for y, x in np.ndindex(h, w)
            if classes[y, x] == c and any(
                0 <= v < h and 0 <= u < w and classes[v, u] not in (c, 255)
                for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
            )
        ]  # fmt: skip

    def near(points, others):
        return sum(any(np.hypot(y - v, x - u) <= tolerance for v, u in others) for y, x in points)

    rows = []
    for c in range(num_classes):
        true, found = boundary(labels, c), boundary(predicted, c)
        rows.append([len(true), near(true, found), len(found), near(found, true)])
    return rows


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), tolerance=st.integers(0, 3))
def test_boundaries_against_loops(seed, tolerance):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.repeat(rng.choice([0, 1, 2, 255], (3, 3)), 3, axis=0), 2, axis=1).astype(np.uint8)
    predicted = np.repeat(rng.integers(0, 3, (9, 2)), 3, axis=1)
    counts = segmentation.boundary_counts(labels, predicted, 3, tolerance)
    assert counts.tolist() == slow_boundary_counts(labels, predicted, 3, tolerance)


def test_boundary_f1():
    counts = np.array([[10, 5, 4, 4], [0, 0, 0, 0], [3, 0, 0, 0], [2, 0, 5, 0]])
    found = segmentation.boundary_f1(counts)
    assert found["classes"] == [pytest.approx(2 * 0.5 / 1.5), None, 0.0, 0.0]
    assert found["mean"] == pytest.approx(2 / 9)
    labels = np.zeros((6, 8), np.uint8)
    labels[2:, 3:] = 1
    assert segmentation.boundary_f1(segmentation.boundary_counts(labels, labels, 2, 0))["mean"] == 1.0
