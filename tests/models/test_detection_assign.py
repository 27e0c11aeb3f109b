"""Matcher, sampler and order of objects against slow twins in NumPy."""

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from infmae_jax.models.heads import assign
from infmae_jax.models.heads.assign import IGNORED, NEGATIVE, POSITIVE, Targets
from tests.models.test_detection_boxes import ordered, padded, slow_iou, some_boxes

OBJECTS, CANDIDATES = 4, 12


def slow_match(candidates, usable, objects, low, high, force):
    """Objects: (box, valid, crowd) each. Indices and labels, candidate by candidate."""
    real = [i for i, (_, valid, crowd) in enumerate(objects) if valid and not crowd]
    iou = np.array([[slow_iou(c, objects[i][0]) for i in real] for c in candidates]).reshape(len(candidates), -1)
    matched, labels = [], []
    for n, candidate in enumerate(candidates):
        best = max(iou[n], default=-1)
        matched.append(real[list(iou[n]).index(best)] if real and usable[n] else 0)
        label = POSITIVE if best >= high else IGNORED if best >= low else NEGATIVE
        for crowd_box, _, crowd in objects:
            if crowd and label == NEGATIVE:
                sides = np.minimum(candidate[2:], crowd_box[2:]) - np.maximum(candidate[:2], crowd_box[:2])
                area = np.prod(candidate[2:] - candidate[:2])
                if area and np.prod(np.maximum(sides, 0)) / area >= 0.5:
                    label = IGNORED
        if force:
            for column in range(len(real)):
                most = max((iou[m, column] for m in range(len(candidates)) if usable[m]), default=0)
                if most > 0 and iou[n, column] == most:
                    label = POSITIVE
        labels.append(label if usable[n] else IGNORED)
    return matched, labels


def image(boxes, valid, crowd=None, classes=None):
    """Targets of one image, without batch dimension."""
    crowd = np.zeros(len(boxes), bool) if crowd is None else crowd
    classes = np.zeros(len(boxes), np.int32) if classes is None else classes
    return Targets(np.array([8, 8], np.int32), np.asarray(boxes, np.float32), classes, valid, crowd)


quick_match = jax.jit(assign.match, static_argnums=(3, 4, 5))


@given(some_boxes, some_boxes.map(lambda rows: rows[:OBJECTS]), st.integers(0, 2**32 - 1), st.booleans())
@example([(0, 0, 2, 2)] * 3, [(0, 0, 2, 2)] * 2, 0, True)
@example([(0, 0, 2, 2), (2, 0, 4, 2)], [(2, 2, 4, 4)], 0, True)
@example([(0, 0, 4, 4), (1, 0, 5, 4)], [(0, 0, 0, 0)], 0, True)
@settings(deadline=None, max_examples=100)
def test_matcher(candidates, boxes, seed, force):
    rng = np.random.default_rng(seed)
    count = len(boxes)
    candidates, boxes = padded(ordered(candidates), CANDIDATES), padded(ordered(boxes), OBJECTS)
    usable, crowd = rng.random(CANDIDATES) < 0.9, rng.random(OBJECTS) < 0.2
    valid = (np.arange(OBJECTS) < count) & (rng.random(OBJECTS) < rng.choice([0.0, 0.8, 1.0]))
    crowd &= valid
    matched, label = quick_match(candidates, usable, image(boxes, valid, crowd), 0.3, 0.7, force)
    wanted = slow_match(candidates, usable, list(zip(boxes, valid, crowd)), 0.3, 0.7, force)
    assert label.tolist() == wanted[1]
    assert [m for m, positive in zip(matched.tolist(), label == POSITIVE) if positive] == [
        m for m, positive in zip(wanted[0], label == POSITIVE) if positive
    ]


def test_padded_objects_force_nothing():
    """The box of a padded object lies where an anchor is: it stays background, as do all."""
    candidates = np.array([[0, 0, 4, 4], [0, 0, 1, 1], [5, 5, 9, 9]], np.float32)
    boxes = np.array([[0, 0, 4, 4], [0, 0, 1, 1]], np.float32)
    label = quick_match(candidates, np.ones(3, bool), image(boxes, np.zeros(2, bool)), 0.3, 0.7, True)[1]
    assert label.tolist() == [NEGATIVE] * 3


def test_an_object_forces_all_of_its_best_anchors():
    candidates = np.array([[0, 0, 4, 4], [4, 0, 8, 4], [20, 0, 24, 4]], np.float32)
    boxes = np.array([[3, 0, 5, 1]], np.float32)  # IoU 1/17 with the first two
    for force, wanted in ((True, [POSITIVE, POSITIVE, NEGATIVE]), (False, [NEGATIVE] * 3)):
        label = quick_match(candidates, np.ones(3, bool), image(boxes, np.ones(1, bool)), 0.3, 0.7, force)[1]
        assert label.tolist() == wanted


def test_crowds_are_neither_object_nor_background():
    candidates = np.array([[0, 0, 4, 4], [8, 0, 12, 4], [11, 0, 15, 4], [20, 0, 24, 4]], np.float32)
    boxes, crowd = np.array([[0, 0, 4, 4], [0, 0, 12, 4]], np.float32), np.array([False, True])
    label = quick_match(candidates, np.ones(4, bool), image(boxes, np.ones(2, bool), crowd), 0.5, 0.5, False)[1]
    assert label.tolist() == [POSITIVE, IGNORED, NEGATIVE, NEGATIVE]


def slow_sample(label, noise, count, positives):
    chosen = []
    for wanted, most in ((POSITIVE, positives), (NEGATIVE, count)):
        places = sorted(np.flatnonzero(label == wanted), key=lambda i: (-noise[i], i))
        chosen.append(places[:most])
    return chosen[0], chosen[1][: count - len(chosen[0])]


quick_sample = jax.jit(assign.sample, static_argnums=(2, 3))


@given(
    st.lists(st.sampled_from([POSITIVE, NEGATIVE, IGNORED]), min_size=CANDIDATES, max_size=CANDIDATES),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75]), min_size=CANDIDATES, max_size=CANDIDATES),
    st.sampled_from([(4, 0.5), (8, 0.25), (16, 0.5), (3, 0.1)]),
)
@example([POSITIVE] * CANDIDATES, [0.0] * CANDIDATES, (8, 0.25))
@example([IGNORED] * CANDIDATES, [0.0] * CANDIDATES, (8, 0.25))
@settings(deadline=None, max_examples=100)
def test_sampler(label, noise, size):
    label, noise = np.array(label), np.array(noise, np.float32)
    drawn = quick_sample(label, noise, *size)
    positive, negative = slow_sample(label, noise, size[0], max(int(size[0] * size[1]), 1))
    assert drawn.index.shape == drawn.valid.shape == (size[0],)
    assert drawn.index[drawn.positive].tolist() == positive
    assert drawn.index[drawn.valid & ~drawn.positive].tolist() == negative
    assert drawn.positive.tolist() == [i < len(positive) for i in range(size[0])]


def test_sampling_is_even():
    """Over many keys every negative is drawn about as often."""
    label = np.array([NEGATIVE] * 20)
    keys = jax.random.split(jax.random.key(0), 2000)
    draw = jax.vmap(lambda key: assign.sample(label, jax.random.uniform(key, (20,)), 5, 0.5).index)
    counts = np.bincount(np.asarray(jax.jit(draw)(keys)).ravel(), minlength=20)
    assert abs(counts - 500).max() < 5 * (500 * 0.75) ** 0.5


in_order = jax.jit(assign.in_order)


@given(st.permutations(range(6)), st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_order_of_objects_is_forgotten(places, seed):
    rng = np.random.default_rng(seed)
    boxes = ordered(rng.integers(0, 3, (6, 4))).astype(np.float32)
    one = image(boxes, rng.random(6) < 0.7, rng.random(6) < 0.3, rng.integers(0, 2, 6).astype(np.int32))
    masks = (boxes.sum(axis=1) + one.classes / 2).reshape(6, 1, 1) * np.ones((6, 3, 3), np.float32)
    one = jax.tree.map(lambda x: x[None], one._replace(masks=masks))
    moved = {name: value[:, list(places)] for name, value in one._asdict().items() if name != "sizes"}
    two = one._replace(**moved)
    first, second = in_order(one), in_order(two)
    real = np.asarray(first.valid[0])
    for name in ("boxes", "valid"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name in ("classes", "crowd", "masks"):
        np.testing.assert_array_equal(getattr(first, name)[0][real], getattr(second, name)[0][real])
    assert real.sum() == (one.valid[0] & (np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) > 0)).sum()
    assert real.tolist() == sorted(real.tolist(), reverse=True)
    assert (np.asarray(first.boxes[0][~real]) == [0, 0, 1, 1]).all()


def test_objects_keep_what_belongs_to_them():
    boxes = np.array([[[5, 5, 9, 9], [0, 0, 0, 0], [1, 1, 4, 4]]], np.float32)
    masks = np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1) * np.ones((1, 3, 2, 2), np.float32)
    given_ = Targets(
        np.array([[8, 8]], np.int32), boxes, np.array([[7, 8, 9]], np.int32), np.array([[True, True, True]]),
        np.array([[True, False, False]]), masks,
    )  # fmt: skip
    found = in_order(given_)
    assert found.valid.tolist() == [[True, True, False]]
    assert found.boxes[0, :2].tolist() == [[1, 1, 4, 4], [5, 5, 9, 9]]
    assert found.classes[0, :2].tolist() == [9, 7] and found.crowd[0].tolist() == [False, True, False]
    assert found.masks[0, :2, 0, 0].tolist() == [2, 0]
    assert found.sizes.tolist() == [[8, 8]]


@pytest.mark.parametrize("count, share, most", [(256, 0.5, 128), (512, 0.25, 128), (10, 0.01, 1), (3, 0.5, 1)])
def test_most_positive(count, share, most):
    assert assign.most_positive(count, share) == most
