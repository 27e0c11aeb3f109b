"""Intensity mappings against their definitions, computed the slow way."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data_pipelines.errors import InputError
from data_pipelines.intensity import MAPPINGS, Intensity, count_values

images = st.one_of(
    arrays.arrays(dtype, st.tuples(st.integers(1, 20), st.integers(1, 20))) for dtype in (np.uint8, np.uint16)
)


def linear(pixels, low, high):
    """`low` -> 0, `high` -> 255, rounded, clipped."""
    return np.clip(np.rint((pixels.astype(float) - low) * 255 / (high - low)), 0, 255).astype(np.uint8)


@given(images, st.sampled_from(["auto", "full_range", "min_max", "percentile"]))
@settings(deadline=None)
def test_mappings_give_uint8_of_the_same_shape_and_keep_order(pixels, mapping):
    mapped = Intensity(mapping).apply(pixels)
    assert mapped.dtype == np.uint8 and mapped.shape == pixels.shape
    order = np.argsort(pixels, axis=None)
    assert (np.diff(mapped.ravel()[order].astype(int)) >= 0).all()


@given(images)
def test_full_range(pixels):
    expected = pixels if pixels.dtype == np.uint8 else linear(pixels, 0, 65535)
    np.testing.assert_array_equal(Intensity("full_range").apply(pixels), expected)


@given(images)
def test_min_max(pixels):
    low, high = pixels.min(), pixels.max()
    expected = linear(pixels, float(low), float(high)) if high > low else np.zeros_like(pixels, np.uint8)
    np.testing.assert_array_equal(Intensity("min_max").apply(pixels), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bounds", [(1, 99), (0, 100), (5, 60)])
def test_percentile(dtype, bounds):
    pixels = np.random.default_rng(3).gamma(4, 6, (64, 80)).astype(dtype)
    low, high = np.percentile(pixels, bounds, method="inverted_cdf")
    mapped = Intensity("percentile", *bounds).apply(pixels)
    np.testing.assert_array_equal(mapped, linear(pixels, float(low), float(high)))


def test_fixed_is_in_source_units_and_stable_across_frames():
    kelvin = np.array([[250.0, 273.15, 300.0, 400.0]])
    for scale, offset in ((0.01, 0.0), (0.005, 200.0)):
        stored = np.rint((kelvin - offset) / scale).astype(np.uint16)
        mapped = Intensity("fixed", 253.15, 323.15).apply(stored, {"scale": scale, "offset": offset})
        np.testing.assert_array_equal(mapped, linear(kelvin, 253.15, 323.15))


def test_auto_leaves_8_bit_alone_and_shows_a_small_range_of_16_bit():
    gray = np.random.default_rng(4).integers(0, 256, (30, 30), dtype=np.uint8)
    assert Intensity().apply(gray) is gray
    low_range = np.random.default_rng(5).integers(0, 906, (100, 100)).astype(np.uint16)
    low_range[0, 0] = 65535  # a dead pixel must not make the rest black
    assert Intensity().apply(low_range).std() > 60


@given(images)
def test_histogram_counts_every_value(pixels):
    counts = count_values(pixels)
    values, expected = np.unique(pixels, return_counts=True)
    assert counts.sum() == pixels.size
    np.testing.assert_array_equal(counts[values], expected)


@pytest.mark.parametrize(
    ("mapping", "bounds"),
    [
        ("log", ()),
        ("percentile", (99, 1)),
        ("percentile", (-1, 50)),
        ("fixed", ()),
        ("fixed", (5.0, 5.0)),
        ("fixed", (0.0, float("inf"))),
    ],
)
def test_unusable_mapping_is_one_line(mapping, bounds):
    with pytest.raises(InputError) as error:
        Intensity(mapping, *bounds)
    assert mapping in str(error.value) and "\n" not in str(error.value)


def test_mappings_are_listed():
    assert MAPPINGS == ("auto", "full_range", "min_max", "percentile", "fixed")
