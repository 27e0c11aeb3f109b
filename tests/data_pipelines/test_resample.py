"""The resize against its definition (a slow one, here) and against Pillow: never more than one level apart."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from data_pipelines.resample import resize
from data_pipelines.transforms import draw_crop

sides = st.integers(1, 90)


def _noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def _keys(distance):
    """Keys' cubic with a = -0.5."""
    distance = abs(distance)
    if distance < 1:
        return 1.5 * distance**3 - 2.5 * distance**2 + 1
    return -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2 if distance < 2 else 0.0


def _slow_resize_rows(pixels, size):
    """Antialiased cubic along axis 0, one output row at a time, clipped but not rounded."""
    step = pixels.shape[0] / size
    widen = max(step, 1.0)
    rows = []
    for index in range(size):
        center = (index + 0.5) * step
        weights = [_keys((row + 0.5 - center) / widen) for row in range(len(pixels))]
        rows.append(np.tensordot(np.array(weights) / sum(weights), pixels.astype(np.float64), 1))
    return np.clip(np.array(rows), 0, 255)


def _columns_first(height, width, rows, columns):
    return not (height > rows and height - rows > 2 * (width - columns))


def _slow_resize(image, rows, columns):
    if _columns_first(*image.shape, rows, columns):
        return _slow_resize_rows(_slow_resize_rows(image.T, columns).T, rows)
    return _slow_resize_rows(_slow_resize_rows(image, rows).T, columns).T


def _pillow_resize(image, rows, columns):
    """In two calls, as the order of the two passes inside one call depends on Pillow's version."""
    steps = [(columns, image.shape[0]), (columns, rows)]
    if not _columns_first(*image.shape, rows, columns):
        steps[0] = (image.shape[1], rows)
    picture = Image.fromarray(image)
    for size in steps:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(picture)


def _difference(a, b):
    return np.abs(a.astype(np.float64) - b)


@hypothesis.given(height=sides, width=sides, rows=st.integers(1, 40), columns=st.integers(1, 40))
@hypothesis.settings(max_examples=40, deadline=None)
def test_resize_is_antialiased_bicubic(height, width, rows, columns):
    image = _noise(height, width)
    got = resize(image, (rows, columns))
    assert got.shape == (rows, columns) and got.dtype == np.uint8
    # Half a level of rounding at the end, quarters of a level between the passes.
    assert _difference(got, _slow_resize(image, rows, columns)).max() < 0.8


def test_resize_is_nearer_to_the_exact_filter_than_pillow():
    image = _noise(150, 190)
    exact = _slow_resize(image, 80, 96)
    ours, pillows = (_difference(f(image, 80, 96), exact).mean() for f in (_resize, _pillow_resize))
    assert ours < pillows and ours < 0.27  # 0.25 is the mean error of rounding alone


def _resize(image, rows, columns):
    return resize(image, (rows, columns))


def _hard(image, kind):
    """Images whose errors add up: overshooting and clipped, or equal along an axis."""
    black_and_white = np.where(image < 128, 0, 255).astype(np.uint8)
    return {
        "noise": image,
        "black and white": black_and_white,
        "equal rows": np.repeat(image[:1], len(image), 0),
        "equal columns": np.repeat(image[:, :1], image.shape[1], 1),
        "stripes": np.repeat(black_and_white[:1], len(image), 0),
    }[kind]


@hypothesis.given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    rows=sides,
    columns=sides,
    seed=st.integers(0, 5),
    kind=st.sampled_from(["noise", "black and white", "equal rows", "equal columns", "stripes"]),
)
@hypothesis.settings(max_examples=400, deadline=None)
def test_resize_is_within_one_level_of_pillow(height, width, rows, columns, seed, kind):
    image = _hard(_noise(height, width, seed), kind)
    assert _difference(resize(image, (rows, columns)), _pillow_resize(image, rows, columns)).max() <= 1


@hypothesis.given(level=st.integers(0, 255), height=sides, width=sides, rows=sides, columns=sides)
@hypothesis.settings(deadline=None)
def test_flat_images_stay_exactly_flat(level, height, width, rows, columns):
    assert (resize(np.full((height, width), level, np.uint8), (rows, columns)) == level).all()


def test_the_order_of_additions_changes_nothing():
    """Sums are exact: reversed along an axis, the image gives the reversed result to the last bit."""
    image = _noise(333, 417)
    result = resize(image, (224, 224))
    np.testing.assert_array_equal(resize(image[::-1], (224, 224))[::-1], result)
    np.testing.assert_array_equal(resize(image[:, ::-1], (224, 224))[:, ::-1], result)


@pytest.mark.parametrize("shape", [(512, 640), (1024, 6912), (23, 40)])
def test_usual_sizes_are_within_one_level_of_pillow(shape):
    image = _noise(*shape)
    assert _difference(resize(image, (224, 224)), _pillow_resize(image, 224, 224)).max() <= 1


def test_views_are_resized_as_their_copies_are():
    image = _noise(90, 80)
    for view in (image[:, ::-1], image.T, image[5:70, 3:60]):
        np.testing.assert_array_equal(resize(view, (32, 48)), resize(view.copy(), (32, 48)))


def test_same_size_is_left_alone():
    image = _noise(9, 7)
    np.testing.assert_array_equal(resize(image, (9, 7)), image)


def test_crops_of_real_images_are_within_one_level_of_pillow(shared_folder):
    rng = np.random.default_rng(0)
    for path in sorted((shared_folder / "data").glob("*/images/val/*.jpg"))[::40]:
        image = np.asarray(Image.open(path).convert("L"))
        crop = draw_crop(rng, *image.shape).of(image)
        ours = resize(crop, (224, 224))
        assert _difference(ours, _pillow_resize(crop, 224, 224)).max() <= 1
