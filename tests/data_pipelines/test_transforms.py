"""Crops, flips and augmentations against their definitions."""

import dataclasses
import math
from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from data_pipelines.errors import InputError
from data_pipelines.examples import IGNORE
from data_pipelines.transforms import (
    PAD_GRAY,
    Crop,
    Geometry,
    InfraredAugment,
    center_crop_resize,
    draw_crop,
    infrared_augment,
    resize,
)
from data_pipelines.views import View

sides = st.integers(1, 90)


def _noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


@hypothesis.given(height=st.integers(1, 400), width=st.integers(1, 400), seed=st.integers(0, 99))
@hypothesis.settings(deadline=None)
def test_boxes_lie_inside(height, width, seed):
    box = draw_crop(np.random.default_rng(seed), height, width)
    assert box.height >= 1 and box.width >= 1
    assert 0 <= box.top and box.top + box.height <= height
    assert 0 <= box.left and box.left + box.width <= width


def test_boxes_follow_the_definition():
    """On a huge image no box is refused for the ratio alone, so the drawn shares and ratios are the stated ones."""
    rng = np.random.default_rng(0)
    boxes = [draw_crop(rng, 4000, 4000, (0.1, 0.5), (0.5, 2.0)) for _ in range(20000)]
    areas = np.array([box.height * box.width / 4000**2 for box in boxes])
    log_ratios = np.log([box.width / box.height for box in boxes])
    quantiles = np.linspace(0.05, 0.95, 19)
    np.testing.assert_allclose(np.quantile(areas, quantiles), 0.1 + 0.4 * quantiles, atol=0.01)
    np.testing.assert_allclose(np.quantile(log_ratios, quantiles), math.log(2) * (2 * quantiles - 1), atol=0.03)
    places = np.array([box.top / (4000 - box.height) for box in boxes])
    np.testing.assert_allclose(np.quantile(places, quantiles), quantiles, atol=0.015)


def _slow_box(rng, height, width):
    """RandomResizedCrop written from its definition: rejection on the continuous shape, 0.2-1, 3/4-4/3."""
    for _ in range(10):
        area = rng.uniform(0.2, 1.0) * height * width
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if columns <= width and rows <= height:
            return rows, columns
    return min(height, round(width / (3 / 4))), min(width, round(height * 4 / 3))


def test_sizes_on_a_camera_frame_are_distributed_as_defined():
    ours, theirs = np.random.default_rng(1), np.random.default_rng(2)
    boxes = np.array([(box.height, box.width) for box in (draw_crop(ours, 512, 640) for _ in range(20000))])
    expected = np.array([_slow_box(theirs, 512, 640) for _ in range(20000)])
    quantiles = np.linspace(0.05, 0.95, 10)
    for axis in (0, 1):
        np.testing.assert_allclose(
            np.quantile(boxes[:, axis], quantiles), np.quantile(expected[:, axis], quantiles), rtol=0.015
        )


@pytest.mark.parametrize("height,width,expected", [(10, 1000, (10, 13)), (1000, 10, (13, 10)), (1, 1, (1, 1))])
def test_images_too_long_for_any_box_give_the_centre(height, width, expected):
    box = draw_crop(np.random.default_rng(0), height, width, (0.9, 1.0))
    assert (box.height, box.width) == expected
    assert (box.top, box.left) == ((height - expected[0]) // 2, (width - expected[1]) // 2)


def test_crops_are_the_resized_box_and_repeat_with_the_generator():
    image = _noise(100, 130)
    view = View((32, 48), scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=False)
    crops = [view.geometry(100, 130, np.random.default_rng(7)).image(image) for _ in range(2)]
    np.testing.assert_array_equal(*crops)
    box = draw_crop(np.random.default_rng(7), 100, 130)
    np.testing.assert_array_equal(crops[0], resize(box.of(image), (32, 48)))
    assert crops[0].shape == (32, 48)


def test_flip_mirrors_half_of_the_time():
    rng = np.random.default_rng(0)
    drawn = [View((16, 16)).geometry(40, 60, rng) for _ in range(2000)]
    assert 900 < sum(each.mirrored for each in drawn) < 1100
    assert not any(View((16, 16), flip=False).geometry(40, 60, rng).mirrored for _ in range(20))


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (20, 300), (512, 640)])
@pytest.mark.parametrize("size", [(32, 32), (32, 64)])
def test_evaluation_view_is_the_centre_at_the_usual_scale(shape, size):
    _rows, columns = np.mgrid[: shape[0], : shape[1]]
    ramp = (255 * columns / (shape[1] - 1)).astype(np.uint8)
    view = center_crop_resize(ramp, size)
    assert view.shape == size
    # A ramp shows the scale: the view spans size[1] columns of the scaled image, centred.
    factor = 256 / 224 * max(size[0] / shape[0], size[1] / shape[1])
    span = 255 * (size[1] - 1) / (shape[1] * factor - 1)
    middle = view[size[0] // 2].astype(float)
    assert abs((middle[-1] - middle[0]) - span) < 12
    assert abs((middle[0] + middle[-1]) / 2 - 127.5) < 8


def test_evaluation_view_equals_resize_then_centre_crop():
    image = _noise(512, 640)
    scaled = np.asarray(Image.fromarray(image).resize((320, 256), Image.Resampling.BICUBIC))
    view = center_crop_resize(image, (224, 224)).astype(int)
    assert np.abs(view - scaled[16:240, 48:272]).max() <= 1


def test_stretched_view_shows_the_whole_image():
    image = _noise(30, 50)
    np.testing.assert_array_equal(center_crop_resize(image, (16, 16), stretch=True), resize(image, (16, 16)))


def test_nothing_switched_on_changes_and_draws_nothing():
    image, rng = _noise(8, 8), np.random.default_rng(0)
    assert infrared_augment(image, rng, InfraredAugment()) is image
    assert rng.random() == np.random.default_rng(0).random()


def test_inversion_swaps_polarity_with_its_probability():
    image = _noise(6, 6)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(infrared_augment(image, rng, InfraredAugment(invert=1.0)), 255 - image)
    swapped = sum(
        bool((infrared_augment(image, rng, InfraredAugment(invert=0.25)) != image).any()) for _ in range(2000)
    )
    assert 420 < swapped < 580


def test_gain_turns_about_mid_gray_within_its_range():
    image = np.full((4, 4), 27, np.uint8)
    image[0] = 227
    rng = np.random.default_rng(0)
    factors = []
    for _ in range(500):
        result = infrared_augment(image, rng, InfraredAugment(gain=0.25)).astype(float)
        factors.append((result[0, 0] - result[1, 0]) / 200)
        # The ends are 99.5 above and 100.5 below mid-gray.
        assert abs((result[0, 0] + result[1, 0]) / 2 - (127.5 - 0.5 * factors[-1])) <= 0.5
    assert 0.79 < min(factors) < 0.82 and 1.23 < max(factors) < 1.26
    assert abs(np.median(factors) - 1) < 0.05


def test_offset_shifts_and_saturates():
    image, rng = np.full((2, 2), 250, np.uint8), np.random.default_rng(0)
    shifts = [int(infrared_augment(image, rng, InfraredAugment(offset=30))[0, 0]) - 250 for _ in range(400)]
    assert min(shifts) < -28 and max(shifts) == 5


def test_column_noise_is_constant_down_the_columns():
    image = np.full((40, 3000), 128, np.uint8)
    result = infrared_augment(image, np.random.default_rng(3), InfraredAugment(column_noise=8.0))
    assert (result == result[0]).all()
    deviation = np.random.default_rng(3).uniform(0, 8.0)
    assert abs(result[0].astype(float).std() - deviation) < 0.1 * deviation
    assert abs(result[0].astype(float).mean() - 128) < 0.5


def test_blur_is_gaussian_and_keeps_flat_images():
    flat = np.full((20, 20), 77, np.uint8)
    np.testing.assert_array_equal(infrared_augment(flat, np.random.default_rng(0), InfraredAugment(blur=2.0)), flat)
    point = np.zeros((41, 41), np.uint8)
    point[20, 20] = 255
    result = infrared_augment(point, np.random.default_rng(5), InfraredAugment(blur=2.0)).astype(float)
    sigma = np.random.default_rng(5).uniform(0, 2.0)
    rows, columns = np.mgrid[-20:21, -20:21]
    expected = np.exp(-(rows**2 + columns**2) / (2 * sigma**2))
    np.testing.assert_allclose(result, 255 * expected / expected.sum(), atol=1.0)


@pytest.mark.parametrize("bad", [{"gain": -0.1}, {"invert": 1.5}, {"blur": math.nan}, {"offset": math.inf}])
def test_unusable_strengths_are_named(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        InfraredAugment(**bad)


def test_box_selects_the_stated_pixels():
    image = _noise(9, 9)
    np.testing.assert_array_equal(Crop(1, 2, 3, 4).of(image), image[1:4, 2:6])


@st.composite
def geometries(draw):
    """An image's size, and any of the ways in which it can come to lie on a canvas."""
    height, width = draw(st.integers(8, 60)), draw(st.integers(8, 60))
    size = draw(st.integers(8, 60)), draw(st.integers(8, 60))
    view = View(size, draw(st.sampled_from(["", "center", "stretch", "fit"])))
    geometry = view.geometry(height, width, np.random.default_rng(draw(st.integers(0, 99))))
    return (height, width), dataclasses.replace(geometry, mirrored=draw(st.booleans()))


def _slow_source(geometry, shape, row, column):
    """Row and column of the image pixel under the centre of a canvas pixel, or None: one pixel at a time."""
    if geometry.mirrored:
        column = geometry.canvas[1] - 1 - column
    place = []
    crop = geometry.crop
    for at, offset, size, start, extent in zip(
        (row, column), geometry.offset, geometry.size, (crop.top, crop.left), (crop.height, crop.width), strict=True
    ):
        if not offset <= at < offset + size:
            return None
        place.append(start + math.floor(Fraction(2 * (at - offset) + 1, 2) * extent / size))
    return tuple(place)


@hypothesis.given(geometries(), st.integers(0, 99))
@hypothesis.settings(deadline=None)
def test_masks_show_the_pixel_under_each_centre(case, seed):
    shape, geometry = case
    mask = np.random.default_rng(seed).integers(0, 200, shape, dtype=np.uint8)
    moved = geometry.mask(mask)
    assert moved.shape == geometry.canvas
    for row in range(0, geometry.canvas[0], 3):
        for column in range(0, geometry.canvas[1], 3):
            source = _slow_source(geometry, shape, row, column)
            assert moved[row, column] == (IGNORE if source is None else mask[source])


@hypothesis.given(geometries(), st.data())
@hypothesis.settings(deadline=None)
def test_a_mask_drawn_from_a_box_moves_as_the_box(case, data):
    (height, width), geometry = case
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0 + 1, width)), data.draw(st.integers(y0 + 1, height))
    mask = np.zeros((height, width), np.uint8)
    mask[y0:y1, x0:x1] = 1
    inside = geometry.mask(mask) == 1
    boxes, valid = geometry.boxes([[x0, y0, x1, y1]])
    rows, columns = np.mgrid[: geometry.canvas[0], : geometry.canvas[1]]
    left, top, right, bottom = boxes[0].astype(float)
    slack = 1e-4  # a centre on the box's very edge may fall either way
    surely = (columns + 0.5 > left + slack) & (columns + 0.5 < right - slack)
    surely &= (rows + 0.5 > top + slack) & (rows + 0.5 < bottom - slack)
    maybe = (columns + 0.5 > left - slack) & (columns + 0.5 < right + slack)
    maybe &= (rows + 0.5 > top - slack) & (rows + 0.5 < bottom + slack)
    assert inside[surely].all() and not inside[~maybe].any()
    assert valid[0] or not surely.any()
    assert (boxes >= 0).all() and (boxes[:, 2:] <= geometry.canvas[::-1]).all()


@hypothesis.given(geometries(), st.integers(0, 99))
@hypothesis.settings(deadline=None)
def test_mirroring_twice_is_identity_and_points_come_back(case, seed):
    shape, geometry = case
    rng = np.random.default_rng(seed)
    image, points = rng.integers(0, 256, shape, dtype=np.uint8), rng.uniform(0, 60, (5, 2))
    mirrored = dataclasses.replace(geometry, mirrored=not geometry.mirrored)
    np.testing.assert_array_equal(mirrored.image(image)[:, ::-1], geometry.image(image))
    np.testing.assert_allclose(geometry.points_back(geometry.points(points)), points, atol=1e-9)
    boxes, valid = geometry.boxes([[1, 2, 5, 7]])
    other, also = mirrored.boxes([[1, 2, 5, 7]])
    np.testing.assert_allclose(geometry.canvas[1] - other[:, [2, 0]], boxes[:, [0, 2]], atol=1e-4)
    assert (valid == also).all()


def test_polygons_of_boxes_are_their_corners():
    geometry = Geometry(Crop(10, 20, 30, 40), (60, 80), (60, 80), mirrored=True)
    corners = geometry.points([[20, 10], [60, 10], [60, 40], [20, 40]])
    np.testing.assert_allclose(corners, [[80, 0], [0, 0], [0, 60], [80, 60]])


def test_padding_is_gray_and_ignored():
    geometry = Geometry.fit(20, 40, (32, 32))
    image, mask = geometry.image(np.full((20, 40), 7, np.uint8)), geometry.mask(np.zeros((20, 40), np.uint8))
    assert geometry.size == (16, 32) and (image[:16] == 7).all() and (image[16:] == PAD_GRAY).all()
    assert (mask[:16] == 0).all() and (mask[16:] == IGNORE).all()


def test_boxes_that_are_hardly_visible_are_left_out():
    geometry = Geometry(Crop(0, 0, 10, 10), (10, 10), (10, 10))
    boxes, valid = geometry.boxes([[9, 0, 19, 10], [2, 2, 4, 4], [20, 20, 30, 30]], min_visible=0.25)
    assert valid.tolist() == [False, True, False]
    np.testing.assert_array_equal(boxes[:2], [[9, 0, 10, 10], [2, 2, 4, 4]])
    assert geometry.boxes([[9, 0, 19, 10]])[1].all()
    assert geometry.boxes(np.zeros((0, 4)))[0].shape == (0, 4)


@hypothesis.given(height=sides, width=sides, seed=st.integers(0, 99), low=st.floats(0.3, 1), data=st.data())
@hypothesis.settings(deadline=None)
def test_zoomed_parts_keep_the_aspect_ratio_and_contain_the_point(height, width, seed, low, data):
    point = data.draw(st.none() | st.tuples(st.integers(0, height - 1), st.integers(0, width - 1)))
    geometry = Geometry.zoomed(np.random.default_rng(seed), height, width, (48, 64), (low, 2.0), True, point)
    crop, (rows, columns) = geometry.crop, geometry.size
    assert 0 <= crop.top and crop.top + crop.height <= height and 0 <= crop.left and crop.left + crop.width <= width
    assert 0 < rows <= 48 and 0 < columns <= 64
    # one factor for both sides, up to the rounding of both ends; what would be less than half a pixel becomes one
    sides = (rows, crop.height), (columns, crop.width)
    least = max((drawn - 0.5) / (part + 0.5) if drawn > 1 else 0 for drawn, part in sides)
    most = min((drawn + 0.5) / (part - 0.5) if part > 1 else math.inf for drawn, part in sides)
    assert least <= most
    # it fills the canvas, or shows the whole image along that side
    assert crop.height == height or rows >= 46
    assert crop.width == width or columns >= 62
    if point is not None:
        assert 0 <= point[0] - crop.top < crop.height and 0 <= point[1] - crop.left < crop.width
