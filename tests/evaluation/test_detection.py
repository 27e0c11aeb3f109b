"""Average precision against pycocotools, the arbiter; F1 of an image by hand."""

import contextlib
import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data_pipelines.errors import InputError
from data_pipelines.examples import Objects
from infmae_jax.evaluation import detection, hosts
from infmae_jax.evaluation.detection import Boxes, DetectionCounts, image_f1, pairwise_iou

NAMES = ("car", "person", "bus")
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def random_boxes(rng, count, side=200):
    corners = rng.uniform(0, side, (count, 2))
    extents = rng.choice([8, 40, 120], (count, 1)) * rng.uniform(0.5, 1.5, (count, 2))
    return np.concatenate([corners, corners + extents], axis=1).astype(np.float32)


def objects(boxes, classes, crowd=None):
    boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)
    crowd = np.zeros(len(boxes), bool) if crowd is None else np.asarray(crowd)
    return Objects(boxes, np.asarray(classes, np.int32), crowd, area * np.float32(0.8))


def found_near(rng, truth, count):
    """Detections: true boxes moved a little, some of another class, some twice, and others."""
    boxes, classes = random_boxes(rng, count), rng.integers(0, 3, count)
    if len(truth.boxes):
        chosen = rng.integers(0, len(truth.boxes), count // 2)
        moved = truth.boxes[chosen] + rng.normal(0, 2, (len(chosen), 4)).astype(np.float32)
        boxes[: len(chosen)] = np.concatenate(
            [moved.reshape(-1, 2, 2).min(axis=1), moved.reshape(-1, 2, 2).max(axis=1) + 1], axis=1
        )
        classes[: len(chosen)] = np.where(rng.random(len(chosen)) < 0.8, truth.classes[chosen], classes[: len(chosen)])
    scores = np.sort(np.round(rng.random(count), 2))[::-1].astype(np.float32)  # many ties
    return Boxes(boxes, scores, classes.astype(np.int32))


def by_pycocotools(rows):
    """The twelve numbers and AP50 of each class of (image, truth, found)."""
    xywh = lambda box: [float(box[0]), float(box[1]), float(box[2]) - float(box[0]), float(box[3]) - float(box[1])]  # noqa: E731
    annotations, results = [], []
    for image, truth, found in rows:
        for box, number, crowd, area in zip(truth.boxes, truth.classes, truth.crowd, truth.area, strict=True):
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": int(number) + 1, "iscrowd": int(crowd),
                 "area": float(area), "bbox": xywh(box)}
            )  # fmt: skip
        for box, score, number in zip(found.boxes, found.scores, found.classes, strict=True):
            entry = {"image_id": image, "category_id": int(number) + 1, "score": float(score), "bbox": xywh(box)}
            results.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": image} for image, _, _ in rows], "annotations": annotations,
            "categories": [{"id": n + 1} for n in range(3)],
        }  # fmt: skip
        known.createIndex()
        measured = COCOeval(known, known.loadRes(results) if results else COCO(), "bbox")
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured.stats, measured.eval["precision"][0, :, :, 0, -1].mean(axis=0)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**32 - 1), images=st.integers(1, 6), most=st.sampled_from([0, 3, 130]))
def test_average_precision_is_that_of_pycocotools(seed, images, most):
    rng = np.random.default_rng(seed)
    rows, counts = [], DetectionCounts()
    for image in rng.permutation(images).tolist():
        count = int(rng.integers(0, 8))
        truth = objects(random_boxes(rng, count), rng.integers(0, 3, count), rng.random(count) < 0.2)
        rows.append((image, truth, found_near(rng, truth, int(rng.integers(0, most + 1)))))
        counts.add(*rows[-1])
    counts.gather()
    scores = counts.scores(NAMES)
    if not any(len(found.boxes) for _, _, found in rows):
        assert all(scores[name] in (0.0, None) for name in NUMBERS)
        return
    stats, ap50 = by_pycocotools(sorted(rows, key=lambda row: row[0]))
    for name, wanted in zip((*NUMBERS, "AR100"), (*stats[:6], stats[8]), strict=True):
        assert scores[name] is None if wanted < 0 else abs(scores[name] - wanted) < 1e-6, name
    for row, wanted in zip(scores["classes"], ap50, strict=True):
        assert row["AP50"] is None if wanted < 0 else abs(row["AP50"] - wanted) < 1e-6
    ordinary = [truth.classes[~truth.crowd] for _, truth, _ in rows]
    assert [row["boxes"] for row in scores["classes"]] == np.bincount(np.concatenate(ordinary), minlength=3).tolist()
    assert scores["images"] == images and len(scores["classes"][0]["precision"]) == 101


def test_hosts_lose_nothing(monkeypatch):
    """Two hosts' rows, brought together, give the numbers of one that saw all images."""
    rng = np.random.default_rng(3)
    rows = []
    for image in range(7):
        truth = objects(random_boxes(rng, 5), rng.integers(0, 3, 5))
        rows.append((image, truth, found_near(rng, truth, 9 + image)))
    whole, parts = DetectionCounts(), [DetectionCounts(), DetectionCounts()]
    for row in rows:
        whole.add(*row)
        parts[row[0] >= 4].add(*row)
    kept = [[np.array(p._images, float)[:, None], np.concatenate(p._truth), np.concatenate(p._found)] for p in parts]

    step = iter(range(6))

    def gather(value):
        kind = next(step)
        both = [host[kind // 2] for host in kept]
        if kind % 2 == 0:
            return np.array([[len(host)] for host in both], np.int32)
        assert np.asarray(value).dtype == np.uint8
        most = max(map(len, both))
        padded = [np.pad(host, ((0, most - len(host)), (0, 0))) for host in both]
        return np.stack([p.view(np.uint8) for p in padded])

    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    parts[0].gather()
    monkeypatch.undo()
    assert parts[0].scores(NAMES) == whole.scores(NAMES)


def test_sums_over_hosts_are_exact(monkeypatch):
    """What crosses JAX has at most 32 bits there: counts of more pixels than that must not be rounded."""

    def gather(value):
        value = np.asarray(value)
        assert value.itemsize < 8
        return np.stack([value, value])

    monkeypatch.setattr(hosts.jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts.multihost_utils, "process_allgather", gather)
    counts = np.array([[2**33 + 1, 0], [3, 2**24 + 1]])
    found = hosts.summed(counts)
    assert found.dtype == counts.dtype and (found == 2 * counts).all()
    assert hosts.summed(np.array(5)) == 10


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(InputError, match=r"pip install 'infmae-jax\[detection\]'"):
        detection.require_library()


TRUTH = objects([[0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 90, 90]], [0, 1, 0], [False, False, True])


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([], 0.0),
        ([((0, 0, 10, 10), 0, 0.9), ((20, 0, 30, 10), 1, 0.8)], 1.0),
        ([((0, 0, 10, 10), 1, 0.9), ((20, 0, 30, 10), 1, 0.8)], 0.5),
        ([((0, 0, 10, 10), 0, 0.9), ((1, 0, 11, 10), 0, 0.8)], 0.5),
        ([((0, 0, 10, 10), 0, 0.9), ((50, 50, 90, 88), 0, 0.8), ((50, 50, 90, 86), 0, 0.7)], 2 / 3),
        ([((0, 0, 10, 10), 0, 0.4)], 0.0),
    ],
)
def test_f1_of_an_image(found, wanted):
    boxes, classes, scores = (np.array([row[i] for row in found]) for i in range(3))
    found = Boxes(boxes.reshape(-1, 4).astype(np.float32), scores.astype(np.float32), classes.astype(np.int32))
    assert image_f1(TRUTH, found, 0.5) == pytest.approx(wanted)


def test_an_empty_image_is_right_where_nothing_is_found():
    nothing = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32))
    assert image_f1(objects([], []), nothing, 0.5) == 1.0


@settings(deadline=None)
@given(seed=st.integers(0, 1000))
def test_iou_is_that_of_painted_pixels(seed):
    rng = np.random.default_rng(seed)
    corners = np.sort(rng.integers(0, 20, (5, 2, 2)), axis=1).reshape(5, 4)  # some are empty
    painted = np.zeros((5, 20, 20), bool)
    for picture, (x0, y0, x1, y1) in zip(painted, corners, strict=True):
        picture[y0:y1, x0:x1] = True
    both = (painted[:, None] & painted[None]).sum(axis=(2, 3))
    either = (painted[:, None] | painted[None]).sum(axis=(2, 3))
    np.testing.assert_allclose(pairwise_iou(corners, corners), both / np.maximum(either, 1), atol=1e-9)


def test_the_table_says_what_is_not_measured():
    counts = DetectionCounts()
    corners = np.array([[0, 0, 10, 10]], np.float32)
    counts.add(0, objects(corners, [0]), Boxes(corners, np.ones(1), np.zeros(1)))
    text = detection.table_text(counts.scores(NAMES), "whole images")
    assert "car     100.00  100.00        1" in text and "person       -       -        0" in text
    assert "AP 100.00, AP50 100.00, AP75 100.00, APs 100.00, APm -, APl -" in text and "whole images" in text
