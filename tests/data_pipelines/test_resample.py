"""The resize against its definition (a slow one, here) and against Pillow, bit for bit."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from data_pipelines.resample import resize

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
    """Antialiased cubic along axis 0, one output row at a time, rounded as 8-bit storage does."""
    step = pixels.shape[0] / size
    widen = max(step, 1.0)
    rows = []
    for index in range(size):
        center = (index + 0.5) * step
        weights = [_keys((row + 0.5 - center) / widen) for row in range(len(pixels))]
        rows.append(np.tensordot(np.array(weights) / sum(weights), pixels.astype(np.float64), 1))
    return np.clip(np.floor(np.array(rows) + 0.5), 0, 255)


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


@hypothesis.given(height=sides, width=sides, rows=st.integers(1, 40), columns=st.integers(1, 40))
@hypothesis.settings(max_examples=40, deadline=None)
def test_resize_is_antialiased_bicubic(height, width, rows, columns):
    image = _noise(height, width)
    got = resize(image, (rows, columns))
    assert got.shape == (rows, columns) and got.dtype == np.uint8
    # Fixed-point weights may round the other way.
    assert np.abs(got - _slow_resize(image, rows, columns)).max() <= 1


def test_rounding_rarely_differs_from_exact_arithmetic():
    image = _noise(150, 190)
    assert (resize(image, (80, 96)) != _slow_resize(image, 80, 96)).mean() < 1e-3


@hypothesis.given(height=st.integers(1, 300), width=st.integers(1, 300), rows=sides, columns=sides, hard=st.booleans())
@hypothesis.settings(max_examples=300, deadline=None)
def test_resize_equals_pillow_bit_for_bit(height, width, rows, columns, hard):
    image = _noise(height, width)
    if hard:
        image = np.where(image < 128, 0, 255).astype(np.uint8)  # black and white overshoot and are clipped
    np.testing.assert_array_equal(resize(image, (rows, columns)), _pillow_resize(image, rows, columns))


@pytest.mark.parametrize("shape", [(512, 640), (1024, 6912), (23, 40)])
def test_usual_sizes_equal_pillow(shape):
    image = _noise(*shape)
    np.testing.assert_array_equal(resize(image, (224, 224)), _pillow_resize(image, 224, 224))


def test_views_are_resized_as_their_copies_are():
    image = _noise(90, 80)
    for view in (image[:, ::-1], image.T, image[5:70, 3:60]):
        np.testing.assert_array_equal(resize(view, (32, 48)), resize(view.copy(), (32, 48)))


def test_same_size_is_left_alone():
    image = _noise(9, 7)
    np.testing.assert_array_equal(resize(image, (9, 7)), image)
