"""Boxes and anchors against slow twins in NumPy, box by box."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infmae_jax.models.heads import boxes as box
from infmae_jax.models.heads.anchors import STRIDES, level_anchors, propose_sizes

# Few different numbers, so that equal, touching, nested and empty boxes are common.
edges = st.integers(0, 6).map(float)
some_boxes = st.lists(st.tuples(edges, edges, edges, edges), min_size=1, max_size=12)
PADDED = 12


def slow_iou(a, b):
    """In double precision; 0 for two empty boxes."""
    a, b = np.float64(a), np.float64(b)
    shared = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)]
    return shared / (sum(areas) - shared) if sum(areas) > shared else 0.0


def slow_nms(boxes, valid, threshold, groups):
    kept = []
    for i in range(len(boxes)):
        rivals = (j for j in kept if groups[j] == groups[i])
        if valid[i] and all(slow_iou(boxes[j], boxes[i]) <= threshold for j in rivals):
            kept.append(i)
    return [i in kept for i in range(len(boxes))]


def ordered(boxes):
    """Every box with its edges in the right order."""
    boxes = np.array(boxes, np.float32)
    return np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)


def padded(values, count=PADDED):
    return np.pad(values, ((0, count - len(values)), *((0, 0),) * (np.ndim(values) - 1)))


overlaps = jax.jit(lambda first, second: (box.pairwise_iou(first, second), box.coverage(first, second)))


@given(some_boxes, some_boxes)
@settings(deadline=None, max_examples=50)
def test_overlaps(first, second):
    first, second = padded(ordered(first)), padded(ordered(second))
    iou, share = overlaps(first, second)
    iou, share = np.asarray(iou), np.asarray(share)
    wanted = np.array([[slow_iou(a, b) for b in second] for a in first])
    np.testing.assert_allclose(iou, wanted, atol=1e-6)
    areas = np.prod(first[:, 2:] - first[:, :2], axis=1)
    for i, j in np.ndindex(len(first), len(second)):
        shared = np.clip(np.minimum(first[i, 2:], second[j, 2:]) - np.maximum(first[i, :2], second[j, :2]), 0, None)
        assert share[i, j] == pytest.approx(shared.prod() / areas[i] if areas[i] else 0)


def test_boxes_with_edges_in_the_wrong_order_are_empty():
    wrong = jnp.array([[4.0, 4.0, 1.0, 1.0], [0.0, 5.0, 9.0, 2.0]])
    assert not box.area(wrong).any()
    assert not box.pairwise_iou(wrong, jnp.array([[0.0, 0.0, 9.0, 9.0]])).any()


encode, decode = jax.jit(box.encode, static_argnums=2), jax.jit(box.decode, static_argnums=2)
sides = st.floats(0.5, 500, width=32)
place = st.floats(-200, 800, width=32)
real_boxes = st.lists(st.tuples(place, place, sides, sides), min_size=4, max_size=4).map(
    lambda rows: np.array([[x, y, x + w, y + h] for x, y, w, h in rows], np.float32)
)


@given(real_boxes, real_boxes, st.sampled_from([(1.0, 1.0, 1.0, 1.0), (30.0, 30.0, 15.0, 15.0)]))
@settings(deadline=None, max_examples=50)
def test_regression_code(boxes, targets, weights):
    codes = np.asarray(encode(targets, boxes, weights))
    for (x0, y0, x1, y1), (u0, v0, u1, v1), code in zip(np.float64(boxes), np.float64(targets), codes):
        width, height = x1 - x0, y1 - y0
        shift = ((u0 + u1) / 2 - (x0 + x1) / 2) / width, ((v0 + v1) / 2 - (y0 + y1) / 2) / height
        wanted = np.array([*shift, np.log((u1 - u0) / width), np.log((v1 - v0) / height)]) * weights
        np.testing.assert_allclose(code, wanted, rtol=2e-3, atol=2e-3)
    back = np.asarray(decode(codes, boxes, weights))
    grown = codes[:, 2:] / np.array(weights[2:]) > box.MOST_GROWTH
    fine = ~grown.any(axis=1)
    np.testing.assert_allclose(back[fine], targets[fine], rtol=1e-3, atol=0.05)


def test_growth_is_limited_and_only_upwards():
    boxes = jnp.array([[10.0, 20.0, 30.0, 60.0]])
    grown = box.decode(jnp.array([[0.0, 0.0, 100.0, -100.0]]), boxes, (1.0, 1.0, 1.0, 1.0))[0]
    assert grown[2] - grown[0] == pytest.approx(20 * 1000 / 16, rel=1e-4)
    assert grown[3] - grown[1] == pytest.approx(0, abs=1e-5)
    assert (grown[0] + grown[2]) / 2 == pytest.approx(20, abs=1e-3)


def test_clip_to_rows_and_columns():
    boxes = jnp.array([[-3.0, -4.0, 200.0, 300.0], [90.0, 10.0, 95.0, 70.0], [300.0, 1.0, 310.0, 2.0]])
    found = box.clip(boxes, jnp.array([50, 80]))
    assert found.tolist() == [[0, 0, 80, 50], [80, 10, 80, 50], [80, 1, 80, 2]]


quick_nms = jax.jit(box.nms, static_argnums=2)


@given(some_boxes, st.sampled_from([0.0, 0.3, 0.5, 0.7]), st.integers(0, 2**32 - 1))
@example([(0, 0, 2, 2)] * 5, 0.5, 0)
@example([(0, 0, 2, 2), (2, 0, 4, 2), (4, 0, 6, 2)], 0.0, 0)
@example([(0, 0, 0, 0), (0, 0, 0, 0)], 0.5, 1)
@settings(deadline=None, max_examples=100)
def test_suppression_is_greedy(boxes, threshold, seed):
    rng = np.random.default_rng(seed)
    count, boxes = len(boxes), padded(ordered(boxes))
    valid, groups = rng.random(PADDED) < rng.choice([0.0, 0.7, 1.0]), rng.integers(0, 2, PADDED)
    valid[count:] = False
    assert quick_nms(boxes, valid, threshold, groups).tolist() == slow_nms(boxes, valid, threshold, groups)
    assert quick_nms(boxes, valid, threshold).tolist() == slow_nms(boxes, valid, threshold, [0] * PADDED)


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_suppression_of_clustered_proposals(threshold):
    rng = np.random.default_rng(1)
    centres = rng.uniform(0, 300, (20, 2))[rng.integers(0, 20, 400)] + rng.normal(0, 6, (400, 2))
    half = np.exp(rng.normal(2.5, 0.4, (400, 2)))
    boxes = np.concatenate([centres - half, centres + half], axis=1).astype(np.float32)
    found = np.asarray(quick_nms(boxes, np.ones(400, bool), threshold))
    assert found.tolist() == slow_nms(boxes, [True] * 400, threshold, [0] * 400)
    assert 20 < found.sum() < 390


def test_suppression_of_a_chain():
    """Each box overlaps the next alone: every second one stays, which takes as many rounds as there are boxes."""
    first = np.arange(40, dtype=np.float32)
    boxes = np.stack([first, 0 * first, first + 1.7, 0 * first + 1], axis=1)
    kept = quick_nms(boxes, np.ones(40, bool), 0.2)
    assert kept.tolist() == [i % 2 == 0 for i in range(40)]


def test_anchors_of_a_level():
    found = level_anchors(2, 3, 8, 32.0, (0.5, 1.0, 2.0))
    wanted = []
    for row in range(2):
        for column in range(3):
            for ratio in (0.5, 1.0, 2.0):
                width = (32 * 32 / ratio) ** 0.5
                height, x, y = width * ratio, column * 8, row * 8
                wanted.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2])
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert found.dtype == np.float32
    # Published cell anchors of detectron2: size 32, ratios 0.5, 1, 2.
    np.testing.assert_allclose(
        found[:3], [[-22.6274, -11.3137, 22.6274, 11.3137], [-16, -16, 16, 16], [-11.3137, -22.6274, 11.3137, 22.6274]],
        atol=1e-4,
    )  # fmt: skip


def test_anchors_of_a_canvas_are_as_many_as_published():
    sizes = [(-(-512 // stride), -(-640 // stride)) for stride in STRIDES]
    counts = [len(level_anchors(*size, stride, 32.0, (0.5, 1.0, 2.0))) for size, stride in zip(sizes, STRIDES)]
    assert counts == [61440, 15360, 3840, 960, 240]


def test_proposed_sizes_follow_the_boxes():
    rng = np.random.default_rng(0)
    corner, sides = rng.uniform(0, 400, (500, 2)), np.exp(rng.uniform(np.log(6), np.log(30), (500, 2)))
    small = np.concatenate([corner, corner + sides], axis=1)
    large = np.concatenate([corner, corner + 8 * sides], axis=1)
    found = [propose_sizes(boxes) for boxes in (small, large)]
    assert all(len(sizes) == 5 and list(sizes) == sorted(sizes) for sizes in found)
    assert found[0][0] < 14 and found[1][0] > 24
    assert propose_sizes(small[rng.permutation(500)]) == found[0]
    padded = np.concatenate([small, np.zeros((100, 4))])
    assert propose_sizes(padded) == found[0]
    with pytest.raises(ValueError, match="no box to propose"):
        propose_sizes(np.zeros((3, 4)))


def test_proposed_sizes_beat_published_ones_on_small_objects():
    """Share of boxes with an anchor of IoU 0.5 on a grid of the canvas, measured with the anchors themselves."""
    rng = np.random.default_rng(3)
    corner, sides = rng.uniform(0, 100, (200, 2)), np.exp(rng.uniform(np.log(6), np.log(30), (200, 2)))
    boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.float32)

    def recall(sizes):
        rows = [(-(-128 // stride), -(-128 // stride), stride) for stride in STRIDES]
        levels = [level_anchors(*row, size, (0.5, 1.0, 2.0)) for row, size in zip(rows, sizes)]
        iou = np.asarray(box.pairwise_iou(jnp.asarray(np.concatenate(levels)), jnp.asarray(boxes)))
        return (iou.max(axis=0) >= 0.5).mean()

    assert recall(propose_sizes(boxes)) > 0.8
    assert recall((32, 64, 128, 256, 512)) < 0.6
