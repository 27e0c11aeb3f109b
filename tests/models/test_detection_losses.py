"""Proposals, losses and detections against slow twins in NumPy, image by image and box by box."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infmae_jax.models.config import DetectionHeadConfig
from infmae_jax.models.heads.anchors import level_anchors
from infmae_jax.models.heads.assign import Targets
from infmae_jax.models.heads.detection import best_detections
from infmae_jax.models.heads.proposals import Proposals, inside, propose, region_losses
from infmae_jax.models.heads.regions import (
    again_matched,
    box_losses,
    draw_regions,
    mask_losses,
    mask_targets,
)
from tests.models.test_detection_assign import slow_match, slow_sample
from tests.models.test_detection_boxes import slow_nms
from tests.models.test_detection_roi_align import slow_bilinear

CONFIG = DetectionHeadConfig(
    anchor_sizes=(8, 16, 32, 64, 128), rpn_iou=(0.2, 0.4), rpn_samples=16, pre_nms_train=30, pre_nms_test=20,
    proposals_train=25, proposals_test=10, rois=12, max_candidates=40, max_detections=8, score_threshold=0.1,
)  # fmt: skip
SIZE = (32, 40)  # true rows and columns on a canvas of 32 x 48
LEVELS = [level_anchors(32 // s, 48 // s, s, 2 * s, CONFIG.ratios) for s in (4, 8, 16)]
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def slow_decode(code, box, weights):
    code = np.float64(code) / weights
    sides = box[2:] - box[:2]
    centre = (box[:2] + box[2:]) / 2 + code[:2] * sides
    sides = sides * np.exp(np.minimum(code[2:], np.log(1000 / 16)))
    return np.concatenate([centre - sides / 2, centre + sides / 2])


def slow_encode(target, box, weights):
    sides, wanted = box[2:] - box[:2], np.float64(target[2:] - target[:2])
    shift = ((target[:2] + target[2:]) / 2 - (box[:2] + box[2:]) / 2) / sides
    return np.concatenate([shift, np.log(wanted / sides)]) * weights


def slow_clip(box):
    return np.clip(box, 0, [SIZE[1], SIZE[0], SIZE[1], SIZE[0]])


def slow_usable(anchors):
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centre[:, 0] < SIZE[1]) & (centre[:, 1] < SIZE[0])


def slow_proposals(logits, codes, best, count):
    """(score, box, anchor) from the best down."""
    found, first = [], 0
    for level, level_logits, level_codes in zip(LEVELS, logits, codes):
        places = [i for i in np.argsort(-level_logits, kind="stable") if slow_usable(level)[i]][:best]
        boxes = [slow_clip(slow_decode(level_codes[i], level[i], (1, 1, 1, 1))) for i in places]
        real = [b[2] > b[0] and b[3] > b[1] for b in boxes]
        kept = slow_nms(boxes, real, 0.7, [0] * len(boxes))
        found += [(level_logits[i], box, first + i) for i, box, keep in zip(places, boxes, kept) if keep]
        first += len(level)
    return sorted(found, key=lambda row: -row[0])[:count]


@pytest.fixture(scope="module")
def outputs():
    """Logits and codes of two images, of which the first repeats values."""
    rng = np.random.default_rng(0)
    logits = [rng.standard_normal((2, len(level))).astype(np.float32) for level in LEVELS]
    codes = [rng.normal(0, 0.5, (2, len(level), 4)).astype(np.float32) for level in LEVELS]
    return logits, codes


@pytest.fixture(scope="module")
def targets():
    """Three objects, a crowd and padding in the first image; nothing in the second."""
    boxes = np.zeros((2, 5, 4), np.float32)
    boxes[0] = [[2, 3, 12, 10], [20, 5, 36, 25], [3, 3, 12, 11], [24, 16, 40, 32], [0, 0, 1, 1]]
    boxes[1, :, 2:] = 1
    masks = np.random.default_rng(4).random((2, 5, 6, 6)).round().astype(np.float32)
    return Targets(
        np.array([SIZE] * 2, np.int32), boxes, np.array([[2, 0, 1, 0, 0], [0] * 5], np.int32),
        np.array([[True] * 4 + [False], [False] * 5]),
        np.array([[False, False, False, True, False], [False] * 5]), masks,
    )  # fmt: skip


def objects_of(targets, image):
    return list(zip(targets.boxes[image], targets.valid[image], targets.crowd[image]))


@pytest.mark.parametrize("train", [True, False])
def test_proposals(outputs, train):
    sizes = np.array([SIZE] * 2, np.int32)
    found = jax.jit(lambda *args: propose(LEVELS, *args, CONFIG, train))(*outputs, sizes)
    best, count = (30, 25) if train else (20, 10)
    assert found.boxes.shape == (2, count, 4)
    for image in range(2):
        wanted = slow_proposals(*([x[image] for x in part] for part in outputs), best, count)
        assert found.valid[image].tolist() == [i < len(wanted) for i in range(count)]
        real = np.asarray(found.valid[image])
        np.testing.assert_allclose(found.boxes[image][real], [box for _, box, _ in wanted], atol=1e-3)
        assert found.anchor[image][real].tolist() == [anchor for _, _, anchor in wanted]


def test_anchors_on_padding_do_not_exist():
    for level in LEVELS:
        assert inside(level, np.array([SIZE]))[0].tolist() == slow_usable(level).tolist()
    assert not slow_usable(LEVELS[0]).all()


def test_region_losses(outputs, targets):
    whole = np.concatenate(LEVELS)
    noise = np.random.default_rng(1).random(len(whole)).astype(np.float32)
    found = jax.jit(lambda *args: region_losses(LEVELS, *args, CONFIG))(*outputs, targets, noise)
    for image in range(2):
        logits, codes = (np.concatenate([x[image] for x in part]) for part in outputs)
        matched, label = slow_match(whole, slow_usable(whole), objects_of(targets, image), 0.2, 0.4, True)
        positive, negative = slow_sample(np.array(label), noise, 16, 8)
        assert len(positive) == (0 if image else 8) and negative
        probability = 1 / (1 + np.exp(-np.float64(logits)))
        entropy = -np.log(probability[positive]).sum() - np.log(1 - probability[negative]).sum()
        wanted = [slow_encode(targets.boxes[image][matched[i]], whole[i], (1, 1, 1, 1)) for i in positive]
        errors = sum(abs(codes[i] - code).sum() for i, code in zip(positive, wanted))
        assert found["rpn_class"][image] == pytest.approx(entropy / 16, rel=1e-5)
        assert found["rpn_box"][image] == pytest.approx(errors / 16, rel=1e-5)


def proposals_near(targets, seed=2, count=20):
    """Boxes about the objects of the first image, the same in both; one is not there."""
    rng = np.random.default_rng(seed)
    boxes = targets.boxes[0][rng.integers(0, 4, count)] + rng.normal(0, 2, (count, 4)).astype(np.float32)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    valid = np.arange(count) != 7
    return Proposals(*(np.stack([x] * 2) for x in (boxes, valid, rng.permutation(100)[:count].astype(np.int32))))


def test_drawn_regions(targets):
    proposals = proposals_near(targets)
    noise = np.random.default_rng(3).random(105).astype(np.float32)
    found = jax.jit(lambda *args: draw_regions(*args, CONFIG))(proposals, targets, noise)
    for image in range(2):
        objects = targets.valid[image] & ~targets.crowd[image]
        boxes = np.concatenate([proposals.boxes[image], targets.boxes[image]])
        usable = np.concatenate([proposals.valid[image], objects])
        places = np.concatenate([proposals.anchor[image], 100 + np.arange(5)])
        matched, label = slow_match(boxes, usable, objects_of(targets, image), 0.5, 0.5, False)
        positive, negative = slow_sample(np.array(label), noise[places], 12, 3)
        chosen = positive + negative
        assert found.valid[image].tolist() == [i < len(chosen) for i in range(12)]
        assert found.positive[image].tolist() == [i < len(positive) for i in range(12)]
        np.testing.assert_array_equal(found.boxes[image][: len(chosen)], boxes[chosen])
        assert found.matched[image][: len(positive)].tolist() == [matched[i] for i in positive]
        assert image or len(positive) == 3


def some_regions(targets):
    proposals = proposals_near(targets, seed=6)
    return jax.jit(again_matched, static_argnums=3)(proposals.boxes, proposals.valid, targets, 0.5)


def test_regions_of_a_later_head(targets):
    boxes = proposals_near(targets, seed=6).boxes.copy()
    boxes[:, 3, 2] = boxes[:, 3, 0]  # empty
    valid = np.arange(20)[None] != np.array([[7], [8]])
    found = jax.jit(again_matched, static_argnums=3)(boxes, valid, targets, 0.6)
    for image in range(2):
        usable = valid[image] & (np.arange(20) != 3)
        matched, label = slow_match(boxes[image], usable, objects_of(targets, image), 0.6, 0.6, False)
        label = np.array(label)
        assert found.valid[image].tolist() == (usable & (label >= 0)).tolist()
        assert found.positive[image].tolist() == (label == 1).tolist()
        assert (np.asarray(found.matched[image]) == matched)[label == 1].all()
        assert (image == 0) == (label == 1).any()
        assert found.boxes[image][3].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("codes_of", ["class", "all"])
def test_box_losses(targets, codes_of):
    regions, rng = some_regions(targets), np.random.default_rng(8)
    logits = rng.standard_normal((2, 20, 4)).astype(np.float32)
    codes = rng.standard_normal((2, 20, 3 if codes_of == "class" else 1, 4)).astype(np.float32)
    found = jax.jit(box_losses, static_argnums=4)(logits, codes, regions, targets, WEIGHTS)
    for image in range(2):
        entropy, errors = [], []
        for i in np.flatnonzero(regions.valid[image]):
            object_ = int(regions.matched[image, i])
            class_ = int(targets.classes[image, object_]) if regions.positive[image, i] else 3
            exponentials = np.exp(np.float64(logits[image, i]))
            entropy.append(-np.log(exponentials[class_] / exponentials.sum()))
            if regions.positive[image, i]:
                wanted = slow_encode(targets.boxes[image, object_], np.asarray(regions.boxes[image, i]), WEIGHTS)
                errors.append(abs(codes[image, i, class_ if codes_of == "class" else 0] - wanted).sum())
        assert bool(errors) == (image == 0)
        assert found[0][image] == pytest.approx(np.mean(entropy), rel=1e-5)
        assert found[1][image] == pytest.approx(sum(errors) / len(entropy), rel=1e-5)


def test_mask_targets(targets):
    """Each target's cell is the mean of four samples of the object's mask, 0 outside the object's box."""
    regions = some_regions(targets)
    found = np.asarray(jax.jit(mask_targets)(regions, targets))[0]
    rows = np.flatnonzero(regions.positive[0])[:4]
    assert len(rows) == 4
    near = 0
    for i in rows:
        roi, object_ = np.float64(regions.boxes[0, i]), np.float64(targets.boxes[0, regions.matched[0, i]])
        mask = np.pad(targets.masks[0, regions.matched[0, i]], 1)[..., None]
        sides, span = object_[2:] - object_[:2], roi[2:] - roi[:2]
        for row, column in np.ndindex(28, 28):
            values = []
            for a, b in np.ndindex(2, 2):
                point = roi[:2] + span * (np.array([column, row]) + (np.array([b, a]) + 0.5) / 2) / 28
                x, y = (point - object_[:2]) / sides * 6 + 1 - 0.5
                values.append(slow_bilinear(mask, y, x)[0])
            if abs(np.mean(values) - 0.5) > 1e-4:
                assert found[i, row, column] == (np.mean(values) >= 0.5)
                near += 1
    assert near > 0.95 * 4 * 28 * 28 and 0.1 < found[rows].mean() < 0.9


def test_mask_losses():
    rng = np.random.default_rng(9)
    logits, wanted = rng.standard_normal((2, 3, 28, 28)).astype(np.float32), rng.random((2, 3, 28, 28)).round()
    positive = np.array([[True, True, False], [False] * 3])
    p = 1 / (1 + np.exp(-np.float64(logits[0, :2])))
    entropy = -np.where(wanted[0, :2] == 1, np.log(p), np.log(1 - p)).mean()
    np.testing.assert_allclose(mask_losses(logits, wanted.astype(np.float32), positive), [entropy, 0], rtol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_detections(shared):
    """Repeated scores, boxes across the edge, an empty one, one that is no proposal."""
    rng = np.random.default_rng(11)
    corner, sides = rng.uniform(-8, 30, (5, 1, 2)), rng.uniform(8, 14, (15, 1 if shared else 3, 2))
    corner = np.repeat(corner, 3, axis=0) + rng.normal(0, 1, sides.shape)
    boxes = np.concatenate([corner, corner + sides], axis=2).astype(np.float32)
    boxes[4] = [50, 3, 60, 9]
    scores = rng.dirichlet([0.3] * 4, 15).astype(np.float32)[:, :3]
    scores[6] = scores[5]
    valid = np.arange(15) != 9
    size = np.array(SIZE, np.int32)
    found = jax.jit(lambda *args: best_detections(*args, CONFIG))(boxes, scores, valid, size)
    boxes = np.broadcast_to(boxes, (15, 3, 4))
    pairs = [(scores[r, k], slow_clip(boxes[r, k]), k) for r, k in np.ndindex(15, 3) if valid[r] and scores[r, k] > 0.1]
    pairs = sorted(pairs, key=lambda pair: -pair[0])
    real = [b[2] > b[0] and b[3] > b[1] for _, b, _ in pairs]
    kept = slow_nms([b for _, b, _ in pairs], real, 0.5, [k for _, _, k in pairs])
    wanted = [pair for pair, keep in zip(pairs, kept) if keep][:8]
    assert sum(kept) < sum(real) and found.boxes.shape == (8, 4)
    assert found.valid.tolist() == [i < len(wanted) for i in range(8)]
    np.testing.assert_allclose(found.boxes[: len(wanted)], [b for _, b, _ in wanted], atol=1e-5)
    np.testing.assert_allclose(found.scores[: len(wanted)], [s for s, _, _ in wanted])
    assert found.classes[: len(wanted)].tolist() == [k for _, _, k in wanted]
    assert not np.any(found.boxes[len(wanted) :])


def test_nothing_to_detect_and_fewer_pairs_than_rows():
    found = best_detections(jnp.zeros((2, 1, 4)), jnp.zeros((2, 3)), jnp.zeros(2, bool), jnp.array(SIZE), CONFIG)
    assert found.scores.shape == (8,) and not found.valid.any() and not found.scores.any()
