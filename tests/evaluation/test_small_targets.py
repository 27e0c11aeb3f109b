"""Measures of small targets against slow twins: flood fill, pairs of pixels, loops."""

import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from infmae_jax.evaluation.small_targets import SWEEP, SmallTargetCounts, components, matched, table_text

masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


def flood(mask):
    """Sets of pixels that touch by side or corner, in reading order."""
    left, found = set(map(tuple, np.argwhere(mask).tolist())), []
    for start in sorted(left):
        if start not in left:
            continue
        part, stack = set(), [start]
        left.discard(start)
        while stack:
            row, column = stack.pop()
            part.add((row, column))
            for dr, dc in itertools.product((-1, 0, 1), repeat=2):
                if (row + dr, column + dc) in left:
                    left.discard((row + dr, column + dc))
                    stack.append((row + dr, column + dc))
        found.append(part)
    return found


def slow_scores(images, threshold):
    """(scores, truth) pairs -> the measures, by sets of pixels."""
    true = false = missed = targets = found = false_pixels = pixels = 0
    ious = []
    for scores, truth in images:
        truths, predicted = flood(truth == 1), flood((scores > threshold) & (truth != 255))
        pixels += int((truth != 255).sum())
        a, b = set().union(*truths), set().union(*predicted)
        true, false, missed = true + len(a & b), false + len(b - a), missed + len(a - b)
        ious.append(len(a & b) / len(a | b) if a | b else 1.0)
        free = list(predicted)
        for part in truths:
            centre = np.mean(list(part), axis=0)
            best = min(free, key=lambda p: np.linalg.norm(np.mean(list(p), axis=0) - centre), default=None)
            targets += 1
            if best is not None and np.linalg.norm(np.mean(list(best), axis=0) - centre) < 3:
                found += 1
                free.remove(best)
        false_pixels += sum(map(len, free))
    return {
        "IoU": true / (true + false + missed) if true + false + missed else None,
        "F1": 2 * true / (2 * true + false + missed) if true + false + missed else None,
        "nIoU": np.mean(ious),
        "Pd": found / targets if targets else None,
        "Fa": 1e6 * false_pixels / pixels if pixels else None,
    }


@hypothesis.given(st.lists(st.integers(0, 2**31), min_size=1, max_size=3), st.floats(0.02, 0.5), st.booleans())
@hypothesis.settings(deadline=None)
def test_measures_equal_the_slow_twin(seeds, share, ignore):
    images = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        shape = tuple(rng.integers(1, 14, 2))
        truth = (rng.random(shape) < share).astype(np.uint8)
        if ignore:
            truth[rng.random(shape) < 0.1] = 255
        scores = rng.integers(0, 11, shape) / 10 + 0.003  # never at a threshold
        images.append((np.clip(scores, 0, 1), truth))
    counts = SmallTargetCounts()
    for image in images:
        counts.add(*image)
    found = counts.scores()
    for threshold, row in zip((0.5, *SWEEP), ({**found}, *found["sweep"]), strict=True):
        truth = slow_scores(images, threshold)
        for name in truth.keys() & row.keys():
            assert row[name] == (None if truth[name] is None else pytest.approx(truth[name])), (name, threshold)


@hypothesis.given(masks)
@hypothesis.settings(deadline=None)
def test_components_are_those_of_a_flood_fill(mask):
    parts = flood(mask)
    found = components(mask)
    assert [c.area for c in found] == [len(part) for part in parts]
    for c, part in zip(found, parts, strict=True):
        np.testing.assert_allclose((c.row, c.column), np.mean(list(part), axis=0))


@hypothesis.given(st.integers(0, 2**31))
@hypothesis.settings(deadline=None)
def test_auc_counts_pairs_of_pixels(seed):
    rng = np.random.default_rng(seed)
    truth = (rng.random((6, 7)) < 0.3).astype(np.uint8)
    scores = rng.integers(0, 6, (6, 7)) / 5
    counts = SmallTargetCounts()
    counts.add(scores, truth)
    positive, negative = scores[truth == 1], scores[truth == 0]
    found = counts.scores()
    if not len(positive) or not len(negative):
        assert found["AUC"] is None
        return
    wins = (positive[:, None] > negative).sum() + 0.5 * (positive[:, None] == negative).sum()
    assert found["AUC"] == pytest.approx(wins / len(positive) / len(negative))
    rates = [((positive > t).sum() / (len(positive) + 1e-3), (negative > t).sum() / (len(negative) + 1e-3))
             for t in np.arange(11) / 10 + 1e-9]  # fmt: skip
    area = sum((fa - fb) * (ta + tb) / 2 for (ta, fa), (tb, fb) in itertools.pairwise(rates))
    assert found["AUC_11"] == pytest.approx(area, abs=1e-9)


def test_false_component_of_a_matched_ones_area_is_not_free():
    truth, scores = np.zeros((40, 40), np.uint8), np.zeros((40, 40))
    truth[5:8, 5:8] = 1
    scores[5:8, 5:8] = scores[30:33, 30:33] = 1
    counts = SmallTargetCounts()
    counts.add(scores, truth)
    found = counts.scores()
    assert found["Pd"] == 1 and found["Fa"] == pytest.approx(9 / 1600 * 1e6)


def test_diagonal_neighbours_are_one_target_and_one_prediction_finds_one_target():
    mask = np.zeros((8, 8), bool)
    mask[2, 2] = mask[3, 3] = True
    assert len(components(mask)) == 1
    truth = components(np.eye(1, 9, 2, dtype=bool)) + components(np.eye(1, 9, 4, dtype=bool))
    predicted = components(np.eye(1, 9, 3, dtype=bool))
    assert matched(truth, predicted) == [0, None]
    far = components(np.eye(1, 9, 6, dtype=bool))  # 3 pixels from 3: not below
    assert matched(components(np.eye(1, 9, 3, dtype=bool)), far) == [None]


def test_empty_images_follow_the_stated_rule():
    empty, false = SmallTargetCounts(), SmallTargetCounts()
    empty.add(np.zeros((5, 5)), np.zeros((5, 5), np.uint8))
    false.add(np.eye(5), np.zeros((5, 5), np.uint8))
    assert empty.scores()["nIoU"] == 1 and empty.scores()["IoU"] is None and empty.scores()["Pd"] is None
    assert false.scores()["nIoU"] == 0 and false.scores()["IoU"] == 0
    assert "-" in table_text(empty.scores())


def test_counts_of_hosts_add_up():
    rng = np.random.default_rng(0)
    images = [(rng.random((12, 9)), (rng.random((12, 9)) < 0.2).astype(np.uint8)) for _ in range(4)]
    whole, parts = SmallTargetCounts(), [SmallTargetCounts(), SmallTargetCounts()]
    for place, image in enumerate(images):
        whole.add(*image)
        parts[place % 2].add(*image)
    parts[0].values += parts[1].values
    np.testing.assert_allclose(parts[0].values, whole.values)
    assert parts[0].scores()["Pd"] == whole.scores()["Pd"] and whole.scores()["pixels"] == 4 * 108
