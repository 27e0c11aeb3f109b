"""Boxes and masks drawn where they are."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from infmae_jax.box_pictures import box_overlay, box_panel, paste
from infmae_jax.evaluation.detection import Boxes
from infmae_jax.pictures import class_colours, precision_curves

NAMES = ("car", "person\x1b[31m")


def boxes(rows, scores, classes, masks=None):
    return Boxes(np.array(rows, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(classes, int), masks)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000))
def test_a_mask_is_stretched_over_its_box(seed):
    rng = np.random.default_rng(seed)
    mask, (x0, y0) = rng.random((5, 5)), rng.integers(-6, 20, 2)
    width, height = rng.integers(1, 30, 2)
    found = paste(mask, (x0, y0, x0 + width, y0 + height), (24, 32))
    for y, x in np.ndindex(24, 32):
        if not (x0 <= x < x0 + width and y0 <= y < y0 + height):
            assert not found[y, x]
            continue
        v, u = (np.clip((p + 0.5 - first) / extent * 5 - 0.5, 0, 4)
                for p, first, extent in ((y, y0, height), (x, x0, width)))  # fmt: skip
        v0, u0 = min(int(v), 3), min(int(u), 3)
        corner = mask[v0 : v0 + 2, u0 : u0 + 2]
        value = np.array([1 - v + v0, v - v0]) @ corner @ np.array([1 - u + u0, u - u0])
        assert abs(value - 0.5) < 1e-9 or found[y, x] == (value >= 0.5)


def test_frames_have_the_colour_of_their_class_and_small_images_are_enlarged():
    image = np.full((80, 160), 90, np.uint8)
    drawn = np.asarray(box_overlay(image, boxes([[40, 30, 60, 70]], [0.75], [1]), NAMES))
    assert drawn.shape == (160, 320, 3)
    colour = class_colours(3)[2]
    assert (drawn[100, [80, 119]] == colour).all() and (drawn[[60, 139], 100] == colour).all()
    assert (drawn[100, 90] == 90).all()
    assert box_overlay(np.zeros((500, 640), np.uint8), boxes([], [], []), NAMES).size == (640, 500)


@pytest.mark.parametrize("edge", [[-5, -5, 500, 500], [159, 79, 160, 80], [0, 0, 0.2, 0.2]])
def test_boxes_at_the_edge_are_drawn(edge):
    masks = np.ones((1, 28, 28), np.float32)
    assert isinstance(box_overlay(np.zeros((80, 160), np.uint8), boxes([edge], [1], [0], masks), NAMES), Image.Image)


def test_panels_and_curves():
    image = np.zeros((50, 330), np.uint8)
    row = "name", image, boxes([[5, 5, 9, 9]], [1], [0]), boxes([], [], [])
    assert box_panel([row, row], NAMES).shape[1] > 660 and box_panel([], NAMES).ndim == 3
    assert precision_curves([("a$b", [1.0, 0.5, 0.0]), (NAMES[1], [0.0] * 101)]).shape == (640, 960, 3)
    assert precision_curves([]).shape == (640, 960, 3)
