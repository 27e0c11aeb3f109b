"""Tiles: an image is covered, objects on seams are found once, order and padding change nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infmae_jax.evaluation.detection import Boxes
from infmae_jax.evaluation.tiles import detections, joined
from infmae_jax.evaluation.windows import Tile, Windows, tiles_of

WHOLE = Windows((0, 0))


def bright_boxes(image):
    """A perfect detector of bright rectangles that do not touch: class = level - 250, score by area."""
    rows = []
    for level in range(250, 254):
        left = image == level
        while left.any():
            y, x = np.argwhere(left)[0]
            bottom = y + int(np.argmin(np.append(left[y:, x], False)))
            right = x + int(np.argmin(np.append(left[y, x:], False)))
            left[y:bottom, x:right] = False
            rows.append((x, y, right, bottom, level - 250))
    rows = np.array(rows, float).reshape(-1, 5)
    scores = 0.9 - 1e-4 * np.arange(len(rows))
    return Boxes(rows[:, :4].astype(np.float32), scores.astype(np.float32), rows[:, 4].astype(np.int32))


def detect(batch, sizes):
    return [bright_boxes(image[:h, :w]) for image, (h, w) in zip(batch, sizes.tolist(), strict=True)]


def scene(rng, height, width, count, largest):
    """An image, and the rectangles in it, at least two pixels apart, as (x0, y0, x1, y1, class)."""
    image, taken, rows = np.full((height, width), 100, np.uint8), np.zeros((height, width), bool), []
    for _ in range(count):
        h, w = rng.integers(4, largest + 1, 2)
        y, x = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        if not taken[max(0, y - 2) : y + h + 2, max(0, x - 2) : x + w + 2].any():
            number = int(rng.integers(0, 4))
            image[y : y + h, x : x + w], taken[y : y + h, x : x + w] = 250 + number, True
            rows.append((x, y, x + w, y + h, number))
    return image, sorted(rows)


def as_rows(found):
    return sorted((*box, number) for box, number in zip(found.boxes.tolist(), found.classes.tolist(), strict=True))


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), height=st.integers(33, 150), width=st.integers(33, 150))
def test_objects_no_larger_than_the_overlap_are_found_once(seed, height, width):
    rng = np.random.default_rng(seed)
    image, truth = scene(rng, height, width, 12, 20)
    ((_, found),) = detections([0], lambda _: image, detect, Windows((64, 64), (40, 40)), lambda canvas: 3, 100)
    assert as_rows(found) == truth


@settings(deadline=None, max_examples=40)
@given(sides=st.tuples(*[st.integers(1, 300)] * 2), size=st.sampled_from([32, 96]), overlap=st.integers(0, 30))
def test_tiles_cover_the_image_in_few_sizes(sides, size, overlap):
    height, width = sides
    tiles = tiles_of(height, width, Windows((size, size), (size - overlap, size - overlap)))
    seen = np.zeros((height, width), int)
    for tile in tiles:
        seen[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width] += 1
    assert seen.min() >= 1 and {(t.height, t.width) for t in tiles} == {(min(height, size), min(width, size))}
    assert tiles_of(height, width, WHOLE) == [Tile(0, 0, height, width)]


@pytest.mark.parametrize("windows", [WHOLE, Windows((64, 64), (40, 40))])
def test_images_of_many_sizes_come_back_with_their_own_boxes(windows):
    rng = np.random.default_rng(5)
    scenes = {n: scene(rng, *rng.integers(40, 120, 2).tolist(), 8, 20) for n in range(9)}
    found = dict(detections(scenes, lambda n: scenes[n][0], detect, windows, lambda canvas: 4, 100))
    assert set(found) == set(scenes) and all(as_rows(found[n]) == truth for n, (_, truth) in scenes.items())
    (_, few), *_ = detections(scenes, lambda n: scenes[n][0], detect, Windows((64, 64), (40, 40)), lambda canvas: 4, 2)
    assert len(few.boxes) <= 2


def one(box, score=0.8, number=0, masks=None):
    return Boxes(np.array([box], np.float32), np.array([score], np.float32), np.array([number], np.int32), masks)


def test_what_a_seam_cut_stays_where_nothing_sees_more():
    left, right = Tile(0, 0, 64, 64), Tile(0, 40, 64, 64)
    cut, whole = one((50, 10, 64, 20)), one((10, 10, 30, 20), 0.7)  # whole: 50 to 70 in the image
    assert joined([(left, cut), (right, whole)], 9).boxes.tolist() == [[50, 10, 70, 20]]
    # of another class, much less certain, or not there: the cut box is all that is known
    for other in (one((10, 10, 30, 20), 0.7, number=1), one((10, 10, 30, 20), 0.1), one((40, 40, 50, 50))):
        kept = joined([(left, cut), (right, other)], 9).boxes.tolist()
        assert [50, 10, 64, 20] in kept
    # the edge of the image is no seam
    lone = one((0, 10, 20, 20))
    assert joined([(left, lone), (right, one((1, 1, 3, 3), 0.1))], 9).boxes.tolist()[0] == [0, 10, 20, 20]


def test_masks_stay_with_their_boxes():
    masks = [np.full((1, 4, 4), value, np.float32) for value in (0.1, 0.2)]
    parts = [(Tile(0, 0, 64, 64), one((1, 1, 9, 9), 0.5, masks=masks[0])),
             (Tile(0, 40, 64, 64), one((30, 30, 39, 39), 0.9, masks=masks[1]))]  # fmt: skip
    found = joined(parts, 9)
    assert found.boxes[:, 0].tolist() == [70, 1] and found.masks[:, 0, 0].tolist() == pytest.approx([0.2, 0.1])
    assert joined(parts, 1).masks.shape == (1, 4, 4)
