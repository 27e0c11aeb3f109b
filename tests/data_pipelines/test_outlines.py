"""Outlines against COCO's own code, against half-planes, and where a mirrored crop puts them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco_mask

from data_pipelines.examples import CorruptExample
from data_pipelines.outlines import decode_rle, encode_rle, mask_in_box, outline
from data_pipelines.transforms import Crop, Geometry

SIDE = 28
masks = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda size: arrays.arrays(bool, size))


@settings(deadline=None, max_examples=60)
@given(mask=masks)
def test_run_length_codes_are_coco_s(mask):
    theirs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    theirs = {"size": list(theirs["size"]), "counts": theirs["counts"].decode()}
    assert encode_rle(mask) == theirs
    np.testing.assert_array_equal(decode_rle(theirs), mask)
    flat = mask.T.reshape(-1)
    ends = [0, *(np.flatnonzero(np.diff(flat)) + 1).tolist(), flat.size]
    runs = [0] * bool(flat[0]) + np.diff(ends).tolist()
    np.testing.assert_array_equal(decode_rle({"size": mask.shape, "counts": runs}), mask)


@pytest.mark.parametrize("counts", ["0", [5], [3, -1, 4], [6, 1]])
def test_codes_that_do_not_fill_their_size_are_damage(counts):
    with pytest.raises(CorruptExample, match="run-length code of 2x3"):
        decode_rle({"size": [2, 3], "counts": counts})


def whole(size=(60, 80)):
    return Geometry(Crop(0, 0, *size), size, size)


@settings(deadline=None, max_examples=60)
@given(points=arrays.arrays(np.float64, (3, 2), elements=st.floats(1, 59, width=32)))
def test_a_triangle_is_the_cells_whose_centres_lie_inside(points):
    area = np.linalg.det([points[1] - points[0], points[2] - points[0]])
    if abs(area) < 4:
        return
    box = np.concatenate([points.min(axis=0), points.max(axis=0)])
    found = mask_in_box([points.ravel().tolist()], whole(), box, SIDE)
    shares = (np.arange(SIDE) + 0.5) / SIDE
    x, y = np.meshgrid(box[0] + shares * (box[2] - box[0]), box[1] + shares * (box[3] - box[1]))
    sides = []
    for a, b in zip(points, np.roll(points, -1, axis=0), strict=True):
        sides.append(np.sign(area) * ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])))
    inside, near = np.min(sides, axis=0) > 0, np.abs(sides).min(axis=0) < 1e-6
    assert (found.astype(bool) == inside)[~near].all()


def test_several_polygons_are_joined_and_a_hole_is_none():
    left, right = [0, 0, 10, 0, 10, 20, 0, 20], [10, 0, 20, 0, 20, 20, 10, 20]
    assert mask_in_box([left, right], whole(), np.array([0, 0, 20, 20]), 8).all()
    half = mask_in_box([left], whole(), np.array([0, 0, 20, 20]), 8)
    assert half[:, :4].all() and not half[:, 4:].any()


def test_polygons_and_codes_move_with_a_mirrored_enlarged_crop():
    pixels = np.zeros((60, 80), bool)
    pixels[20:40, 30:50] = True
    pixels[20:30, 30:40] = False  # an L lying on its back: neither mirror image of itself
    polygon = [40, 20, 50, 20, 50, 40, 30, 40, 30, 30, 40, 30]
    geometry = Geometry(Crop(10, 20, 40, 40), (80, 80), (96, 96), (0, 16), mirrored=True)
    boxes, valid = geometry.boxes(np.array([[30, 20, 50, 40]], np.float32))
    assert valid.all()
    from_polygon, from_code = (
        mask_in_box(found, geometry, boxes[0], SIDE) for found in ([polygon], encode_rle(pixels))
    )
    canvas = np.zeros((96, 96), bool)
    canvas[:80, :80] = pixels[10:50, 20:60].repeat(2, 0).repeat(2, 1)[:, ::-1]
    x0, y0, x1, y1 = boxes[0].astype(int)
    part = canvas[y0:y1, x0:x1]
    cells = ((2 * np.arange(SIDE) + 1) * 40) // (2 * SIDE)
    np.testing.assert_array_equal(from_polygon, part[cells[:, None], cells])
    np.testing.assert_array_equal(from_code, part[cells[:, None], cells])


BOX = np.array([264, 319, 274, 331], np.float32)


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("", False), ("[]", False), ("[[264, 319, 274, 319, 274, 331, 264, 331]]", False),
        ("[[264, 319, 274, 319, 274, 331, 264, 331, 264, 319]]", False), ("[[264, 319, 274, 319, 270, 331]]", True),
        ("[[264, 319, 269, 319, 269, 331, 264, 331]]", True), ('{"size": [600, 700], "counts": [420000]}', True),
    ],
)  # fmt: skip
def test_a_polygon_that_is_the_box_says_nothing_about_the_outline(text, known):
    assert (outline(text, BOX) is not None) == known


@pytest.mark.parametrize("text", ["{", '"abc"', "[[1, 2, 3]]", '{"counts": "a"}', json.dumps([["a", "b"]])])
def test_other_texts_are_damage(text):
    with pytest.raises(CorruptExample, match="neither polygons"):
        outline(text, BOX)
